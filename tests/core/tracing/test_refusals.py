"""What cannot be read or laid out is told in one line: what, the module's path, the user's own line, what to do."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages import inspect, merge
from stages.core.graph.trace import lay_out
from stages.core.runtime.errors import InputError
from stages.core.tracing.reading import read

HERE = Path(__file__).relative_to(Path(__file__).parents[3])


def helped(x):
    return torch.special.erfcx(x)  # in a function beside the module


class Block(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.many = body, nn.FractionalMaxPool2d(1, output_size=8)

    def forward(self, x):
        return self._forward_impl(x)

    def _forward_impl(self, x):  # what torchvision's networks are written like
        return self.body(self, x)


class Odd(nn.Module):
    """(n, 3, 8, 8) -> (n, 4), with something odd in the middle."""

    def __init__(self, body):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3, padding=1), Block(body), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


BODIES = {  # what is in the middle, words of the refusal, and where it is: path, code
    "in a function": (lambda m, x: helped(x), "no rule for special_erfcx", "block", "return torch.special.erfcx(x)"),
    "in a layer of torch": (
        lambda m, x: m.many(x), "no rule for fractional_max_pool2d", "block.many", "m.many(x"),
    "a mean that drops channels": (
        lambda m, x: x * x.mean(1).sum((1, 2))[:, None, None, None], "mean over the units", "block", "x.mean(1)"),
    "units beside ones": (
        lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 2), value=1.0)[:, :8], "pads units with 1.0", "block", "value=1.0"),
    "units with units": (
        lambda m, x: (x @ x.transpose(1, 2)), "matmul", "block", "x.transpose(1, 2)"),
    "resized channels": (
        lambda m, x: F.interpolate(x.transpose(1, 3), size=(8, 8)).transpose(1, 3),
        "interpolate works on dimension 3", "block", "F.interpolate"),
    "cut in the middle": (
        lambda m, x: F.relu(x.reshape(-1, 2, 16, 8)).reshape(-1, 8, 8, 8),
        "lie on dimensions [0, 1, 2]", "block", "reshape"),
    "a number of it": (lambda m, x: x / x.abs().max().item(), "max over everything", "block", ".item()"),
    "sorted": (lambda m, x: x.sort(1)[0], "sort along the units", "block", "x.sort(1)"),
    "kernels of the image's own": (
        lambda m, x: F.conv2d(x.reshape(1, -1, 8, 8), x.mean((2, 3)).view(-1, 1, 1, 1), groups=8 * len(x)).view_as(x),
        "conv2d whose weight depends on the input", "block", "groups=8 * len(x)"),
    "drawn": (lambda m, x: x + torch.randn_like(x), "no rule for randn_like", "block", "randn_like"),
}  # fmt: skip


@pytest.mark.parametrize("what", BODIES)
def test_a_refusal_says_what_where_and_the_users_own_line(what):
    body, words, path, code = BODIES[what]
    with pytest.raises(InputError) as error:
        inspect(Odd(body), torch.randn(4, 3, 8, 8))
    line = str(error.value)
    found = re.fullmatch(rf"{path}: (.*?) at {HERE}:(\d+) \((.*)\); allowed: .+", line)
    assert found, line
    assert words in found[1]
    source = Path(__file__).read_text().splitlines()[int(found[2]) - 1]
    assert code in source or body.__code__.co_firstlineno <= int(found[2]) <= body.__code__.co_firstlineno + 3
    assert "\n" not in line


def branches(m, x):
    if x.mean() > 0:
        x = x * 2
    return x


FAILING = {
    "a branch": (branches, "data-dependent"),
    "a number of it": (lambda m, x: x * float(x.mean()), "data-dependent"),
    "numpy": (lambda m, x: torch.from_numpy(x.detach().numpy() * 2), "numpy"),
    "a loop over images": (
        lambda m, x: torch.stack([F.relu(own) for own in x]), "one of the images after the other"),
    "a loop by number": (
        lambda m, x: torch.stack([F.relu(x[i]) for i in range(len(x))]), "one of the images after the other"),
    "a loop by slices": (
        lambda m, x: torch.stack([F.relu(x.select(dim=0, index=i)) for i in range(len(x))]), "one of the images after"),
    "unbound images": (lambda m, x: torch.stack([F.relu(own) for own in x.unbind(dim=0)]), "one of the images after"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILING)
def test_where_torch_itself_fails_one_line_says_so_with_the_users_own(what, capfd):
    body, words = FAILING[what]
    with pytest.raises(InputError, match=words) as error:
        read(Odd(body), torch.randn(4, 3, 8, 8))
    number = int(re.search(rf", at {HERE.name}:(\d+)", str(error.value))[1])
    assert 0 <= number - body.__code__.co_firstlineno <= 3
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # torch prints the graph otherwise


class Bytes(Odd):
    def forward(self, x):
        return super().forward(x.float() / 255)


class Divided(Odd):
    def forward(self, x):
        return super().forward(x / 255)


class Single(Odd):
    def forward(self, x):
        return super().forward(torch.tanh(x).to(torch.float32))


def square(m, x):
    return x * x


@pytest.mark.parametrize("kind", [Bytes, Divided])
def test_bytes_are_refused_in_one_line_which_says_what_to_give(kind):
    images = (255 * torch.rand(4, 3, 8, 8)).to(torch.uint8)
    with pytest.raises(InputError, match=rf"^{kind.__name__}.* at \S*{HERE.name}:\d+.*; allowed: ") as error:
        inspect(kind(square), images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Bytes, Divided, Single])
def test_floats_of_a_forwards_own_choice_are_read(kind):
    """As the refusal of bytes says: the same images as floats."""
    networks = {name: kind(square).eval() for name in "ab"}
    networks["b"].load_state_dict(networks["a"].state_dict())
    images = (255 * torch.rand(4, 3, 8, 8)).to(torch.uint8).float()
    merged = merge(
        networks, {name: [images] for name in "ab"}, 1.0, {"match": {"by": "weights"}}, progress=False
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(images), networks["a"](images))


def test_a_value_that_is_only_printed_is_no_part_of_the_network(capsys):
    def prints(m, x):
        sys.stdout.write(f"mean {x.mean()}")
        return x

    graph = read(Odd(prints), torch.randn(4, 3, 8, 8)).graph
    assert [node.operation for node in graph.nodes] == ["input", "conv2d", "mean", "linear"]
    assert capsys.readouterr().out == ""


def test_one_image_looked_at_is_no_loop():
    """Its shape is asked for, as forwards do."""
    read(Odd(lambda m, x: x.view(x.shape[0], x[0].shape[0], 8, -1)), torch.randn(4, 3, 8, 8))


def test_a_graph_from_a_file_is_refused_by_the_name_of_the_node():
    reading = read(Odd(lambda m, x: x * x.mean(1).sum((1, 2))[:, None, None, None]), torch.randn(1, 3, 8, 8))
    shapes = {"stem.weight": (8, 3, 3, 3), "stem.bias": (8,), "head.weight": (4, 8), "head.bias": (4,)}
    with pytest.raises(InputError, match=r"^mean: mean over the units"):
        lay_out(reading.graph, shapes, (1, 3, 8, 8))
