"""Networks that return more than their logits are read as those that return them alone."""

import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from stages import inspect, merge
from stages.core.networks.architectures import build
from stages.core.runtime.errors import InputError

Named = namedtuple("Named", ["logits", "features"])


@dataclasses.dataclass
class Output(OrderedDict):
    logits: torch.Tensor
    loss: None = None

    def __post_init__(self):
        self.update(logits=self.logits, loss=None)


class Returning(nn.Module):
    def __init__(self, packed, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.fc, self.packed = nn.Linear(6, 8), nn.Linear(8, 3), packed

    def forward(self, x):
        features = self.body(x).relu()
        return self.packed(self.fc(features), features)


FORMS = {
    "tensor": lambda logits, _: logits,
    "dict": lambda logits, features: {"features": features, "logits": logits},
    "dict of one": lambda logits, _: {"y": logits},
    "list of one": lambda logits, _: [logits],
    "tuple with None": lambda logits, _: (logits, None),
    "named tuple": Named,
    "object": lambda logits, _: Output(logits),
    "features beside": lambda logits, features: (features, logits),
    "probabilities beside": lambda logits, _: (logits, logits.softmax(1)),
    "whole numbers beside": lambda logits, _: (logits.argmax(1), logits, logits.mean()),
    "detached beside": lambda logits, features: {"y": logits, "x": features.detach()},
    "segmentation": lambda logits, features: OrderedDict(out=logits, aux=features),
}


def images():
    return {
        name: [torch.randn(20, 6, generator=torch.Generator().manual_seed(i))] for i, name in enumerate("ab")
    }


@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_read_and_the_network_is_left_alone(form):
    networks = {name: Returning(FORMS[form], seed) for seed, name in enumerate("ab")}
    plain = {name: Returning(FORMS["tensor"], seed) for seed, name in enumerate("ab")}
    found, expected = (merge(own, images(), 1.3, progress=False) for own in (networks, plain))
    x = images()["a"][0]
    assert torch.equal(found(x), expected(x))
    assert found.plain().state_dict().keys() == plain["a"].state_dict().keys()
    assert isinstance(networks["a"](x), torch.Tensor) == (form == "tensor")
    assert not networks["a"]._forward_hooks
    assert str(inspect(networks["a"], x)) == str(inspect(plain["a"], x))


def test_which_is_read_is_said_once(caplog):
    caplog.set_level("INFO")
    networks = {name: nn.DataParallel(Returning(FORMS["dict"], seed)) for seed, name in enumerate("ab")}
    merge(networks, images(), 1.0, progress=False)
    told = [record.message for record in caplog.records if record.name.endswith("outputs")]
    assert told in (
        [],
        ["Returning: returns a dict of 2; its logits is read"],
    )  # [] where a test before it heard it


@pytest.mark.parametrize(
    ("packed", "found"),
    [
        (lambda logits, features: logits.split([1, 2], 1), r"a tuple of 0, 1.*call\[-1\]\[0\]"),
        (lambda logits, features: {"a": logits, "b": features.exp()}, r"a dict of a, b.*call\[-1\]\['a'\]"),
        (lambda *_: None, "a NoneType of no tensor"),
        (lambda *_: {}, "a dict of no tensor"),
    ],
)
def test_several_of_which_none_is_named_are_refused_in_one_line(packed, found):
    networks = {name: Returning(packed, seed) for seed, name in enumerate("ab")}
    with pytest.raises(InputError, match="Returning: returns " + found) as error:
        merge(networks, images(), 1.0, progress=False)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_words_have_logits_each():
    """The classes are behind the places: a model of language, a tagger."""

    def tagger(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    texts = {name: torch.randint(0, 11, (20, 5), generator=torch.Generator().manual_seed(0)) for name in "ab"}
    found = merge({"a": tagger(0), "b": tagger(1)}, texts, 2.0, labels="separate", progress=False)
    assert found(texts["a"]).shape == (20, 5, 6)
    for seed, name in enumerate("ab"):
        torch.testing.assert_close(found(texts["a"], task=name), tagger(seed)(texts["a"]))


def made(classes: int) -> nn.Module:
    """What a profile names as its architecture."""
    network = Returning(FORMS["dict"])
    network.fc = nn.Linear(8, classes)
    return network


def test_an_architecture_of_ones_own_gives_logits():
    network = build(f"{__name__}:made", {"classes": 4})
    assert network(torch.zeros(2, 6)).shape == (2, 4)
    assert network.train()(torch.zeros(2, 6)).requires_grad
