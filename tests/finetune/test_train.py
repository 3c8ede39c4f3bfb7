import pytest
import torch
from torch import nn

from stages.core.images.load import ImageSet
from stages.core.networks.architectures import build
from stages.core.runtime.errors import InputError
from stages.core.runtime.schedule import parameter_groups
from stages.core.settings.profiles import Data, Finetune
from stages.finetune.train import COLUMNS, train

CPU = torch.device("cpu")
DATA = Data(kind="digits", key="x", size=8, channels=1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(seed=0, classes=2):
    torch.manual_seed(seed)
    return build("resnet", {"depth": 8, "width": 4, "channels": 1, "classes": classes})


def stripes(n=96):
    """Noisy stripes, horizontal or vertical: learnt in a few epochs."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    stripe = (torch.arange(8) % 4 < 2).float()
    clean = torch.stack([stripe.expand(8, 8), stripe.view(8, 1).expand(8, 8)])[labels]
    images = (255 * (0.7 * clean + 0.3 * torch.rand(n, 8, 8, generator=generator))).byte()
    return ImageSet(images.unsqueeze(1), labels, ("vertical", "horizontal"))


def trained(seed=0, module=None, **changes):
    module = network() if module is None else module
    chosen = Finetune(**{"epochs": 4, "batch_size": 16, **changes})
    rows = train(module, stripes(), DATA, chosen, torch.Generator().manual_seed(seed), CPU)
    return module, rows


def test_training_learns_and_reports_it():
    module, rows = trained()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all(tuple(row) == COLUMNS for row in rows)
    assert float(rows[-1]["train_accuracy"]) > 0.95
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    assert not any(part.training for part in module.modules())


def test_the_same_generator_gives_the_same_bits_and_another_does_not():
    (a, rows_a), (b, rows_b), (c, rows_c) = trained(), trained(), trained(seed=1)
    assert rows_a == rows_b != rows_c
    assert all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert not torch.equal(a.fc.weight, c.fc.weight)


def test_training_does_not_depend_on_the_global_random_state():
    first, _ = trained(module=network())
    module = network()
    torch.rand(10)
    second, _ = trained(module=module)
    assert torch.equal(first.fc.weight, second.fc.weight)


def test_mixed_precision_learns_and_keeps_the_weights_in_float32():
    module = network()
    chosen = Finetune(epochs=4, batch_size=16)
    rows = train(module, stripes(), DATA, chosen, torch.Generator().manual_seed(0), CPU, mixed_precision=True)
    assert float(rows[-1]["train_accuracy"]) > 0.95
    assert rows != trained()[1]
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in module.state_dict().values())


def test_a_rate_close_to_zero_changes_the_statistics_only():
    module, _ = trained(learning_rate=1e-30)
    before = network()
    assert torch.equal(module.conv1.weight, before.conv1.weight)
    assert not torch.equal(module.bn1.running_mean, before.bn1.running_mean)
    assert module.bn1.num_batches_tracked == 4 * 96 // 16


def test_fewer_images_than_a_batch_are_one_batch():
    module, _ = trained(batch_size=1000)
    assert module.bn1.num_batches_tracked == 4


def test_a_loss_that_is_not_finite_is_one_line():
    with pytest.raises(InputError, match=r"diverged in epoch \d+: .*learning_rate below 1e\+30") as caught:
        trained(learning_rate=1e30)
    assert "\n" not in str(caught.value)


def test_images_and_classes_that_do_not_fit_are_one_line():
    with pytest.raises(InputError, match="found 2 classes; allowed: 3"):
        trained(module=network(classes=3))
    colour = build("resnet", {"depth": 8, "width": 4, "channels": 3, "classes": 2})
    with pytest.raises(InputError, match="images of 1x8x8, which the network cannot take"):
        trained(module=colour)


def test_norms_and_biases_do_not_decay():
    module = network()
    decaying, free = parameter_groups(module, 0.1)
    kept = {id(p) for p in free["params"]}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            vector = isinstance(part, nn.BatchNorm2d) or name == "bias"
            assert (id(parameter) in kept) == vector
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert len(decaying["params"]) + len(kept) == len(list(module.parameters()))
