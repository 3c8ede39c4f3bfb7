"""Public networks, family by family, and what is expected of each: docs/families.md is made from this.

make test-models                    every network, and the page
python tests/models.py --quick      those of the gate (tests/test_models.py), and their rows of the page
python tests/models.py 'dense*'     those of these names; --report: without the page
"""

import argparse
import fnmatch
import gc
import re
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conv_styles  # noqa: E402
import gates  # noqa: E402
import input_styles  # noqa: E402
import styles  # noqa: E402

from stages.core.runtime.errors import InputError  # noqa: E402

PAGE = ROOT / "docs/families.md"
SLOW = 60.0  # seconds of one core for trace, verify, match and allocate: no network may take more
MEMORY = 12 * 2**30  # bytes: what needs more fails, and the machine goes on
START, STOP = "<!-- rows: python tests/models.py -->", "<!-- end of rows -->"


@dataclass(frozen=True)
class Model:
    """make: a network of 5 classes or fewer. shape: of one image. refused: words of the line that refuses it."""

    make: Callable[[], nn.Module]
    shape: gates.Shape
    refused: str = ""
    quick: bool = False


def vision(name: str, side: int = 64, **settings: object) -> Model:
    """Of torchvision."""

    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=5, **settings)

    return Model(make, (3, side, side))


def timm(name: str, side: int = 64, refused: str = "", **settings: object) -> Model:
    """Of timm."""

    def make() -> nn.Module:
        import timm as library

        return library.create_model(name, pretrained=False, num_classes=5, **settings)

    return Model(make, (3, side, side), refused)


def quick(found: dict[str, tuple[Callable[[], nn.Module], gates.Shape]], words: str = "") -> dict[str, Model]:
    return {f"{name}{words}": Model(make, shape, quick=True) for name, (make, shape) in found.items()}


OWN = 224  # the side of the images that most are published for

MODELS: dict[str, Model] = {
    **quick(styles.STYLES),
    **quick(input_styles.SINGLE),
    **quick(conv_styles.STYLES),
    "global context": Model(*conv_styles.REFUSED["global context"], quick=True),
    "timm resnet18": timm("resnet18"),
    "wide_resnet50_2": vision("wide_resnet50_2"),
    "resnext50_32x4d": vision("resnext50_32x4d"),
    "seresnet18": timm("seresnet18"),
    "skresnet18": timm("skresnet18"),
    "resnetv2_50 (BiT, weight standardisation)": timm("resnetv2_50x1_bit"),
    "densenet121": vision("densenet121"),
    "dpn48b": timm("dpn48b"),
    "res2net50_26w_4s": timm("res2net50_26w_4s"),
    "hrnet_w18_small": timm("hrnet_w18_small"),
    "ghostnet_050": timm("ghostnet_050"),
    "repghostnet_050": timm("repghostnet_050"),
    "shufflenet_v2_x0_5": vision("shufflenet_v2_x0_5"),
    "mobilenet_v2": vision("mobilenet_v2"),
    "mobilenet_v3_small": vision("mobilenet_v3_small"),
    "mobilenetv4_conv_small": timm("mobilenetv4_conv_small"),
    "mobileone_s0": timm("mobileone_s0", OWN),
    "mnasnet0_5": vision("mnasnet0_5"),
    "efficientnet_b0": vision("efficientnet_b0"),
    "tf_efficientnet_b0 (same padding)": timm("tf_efficientnet_b0"),
    "efficientnetv2_rw_t": timm("efficientnetv2_rw_t"),
    "regnetx_002": timm("regnetx_002"),
    "regnety_002": timm("regnety_002"),
    "repvgg_a0": timm("repvgg_a0"),
    "nfnet_l0": timm("nfnet_l0"),
    "nf_resnet26": timm("nf_resnet26"),
    "inception_v3": vision("inception_v3", 299, aux_logits=False, init_weights=False),
    "inception_v4": timm("inception_v4", 96),
    "googlenet": vision("googlenet", aux_logits=False, init_weights=False),
    "legacy_xception": timm("legacy_xception", 96),
    "squeezenet1_1": vision("squeezenet1_1"),
    "alexnet": vision("alexnet"),
    "cspdarknet53": timm("cspdarknet53"),
    "dla34": timm("dla34"),
    "vovnet39a": timm("vovnet39a"),
    "tresnet_m": timm("tresnet_m"),
    "mixnet_s": timm("mixnet_s"),
    "hgnetv2_b0": timm("hgnetv2_b0"),
    "repvit_m0_9": timm("repvit_m0_9"),
    "starnet_s1": timm("starnet_s1"),
    "eca_resnet33ts": timm("eca_resnet33ts"),
    "mobilevitv2_050": timm("mobilevitv2_050"),
    "shvit_s1": timm("shvit_s1", 128),
    "edgenext_xx_small": timm("edgenext_xx_small"),
    "xcit_nano_12_p16_224": timm("xcit_nano_12_p16_224"),
    "cait_xxs24_224": timm("cait_xxs24_224", 32, img_size=32),
    "efficientvit_b0": timm("efficientvit_b0"),
    "efficientvit_m0": timm("efficientvit_m0", OWN),
    "coat_tiny": timm("coat_tiny", img_size=64),
    "davit_tiny": timm("davit_tiny"),
    "volo_d1_224": timm("volo_d1_224", img_size=64),
    "tnt_s_patch16_224": timm("tnt_s_patch16_224", 64, img_size=64),
    "mvitv2_tiny": timm("mvitv2_tiny", img_size=64),
    "gcvit_xxtiny": timm("gcvit_xxtiny", OWN),
    "levit_128s": timm("levit_128s", OWN),
    "tiny_vit_5m_224": timm("tiny_vit_5m_224", OWN),
    "focalnet_tiny_srf": timm("focalnet_tiny_srf"),
    "cs3darknet_s": timm("cs3darknet_s"),
    "rexnet_100": timm("rexnet_100"),
    "fasternet_t0": timm("fasternet_t0"),
    "inception_next_atto": timm("inception_next_atto"),
    "rdnet_tiny": timm("rdnet_tiny"),
    "selecsls42": timm("selecsls42"),
    "test_mambaout": timm("test_mambaout"),
    "resnetv2_18": timm("resnetv2_18"),
    "convit_tiny": timm("convit_tiny", OWN),
    "swiftformer_xs": timm("swiftformer_xs", OWN),
    "visformer_tiny": timm("visformer_tiny", OWN),
    "crossvit_tiny_240": timm("crossvit_tiny_240", 240),
    "pit_ti_224": timm("pit_ti_224", OWN),
    "nasnetalarge": timm("nasnetalarge", 96),
    "pnasnet5large": timm("pnasnet5large", 96),
    "resnest14d": timm("resnest14d"),
    "tf_efficientnet_cc_b0_4e": timm("tf_efficientnet_cc_b0_4e"),
    "convnextv2_atto": timm("convnextv2_atto"),
    "convmixer_1024_20_ks9_p14": timm("convmixer_1024_20_ks9_p14", 56),
}


def outcome(model: Model) -> gates.Row | str:
    """The row of a network, or the line that refuses it."""
    try:
        return gates.check(model.make, model.shape)
    except InputError as error:
        return str(error)


def told(name: str, model: Model, found: gates.Row | str) -> str:
    """A line of the page."""
    shape = " x ".join(map(str, model.shape))
    if isinstance(found, str):
        words = re.split(r"; allowed| at \S+:\d+ ", found)[0]
        return f"| {name} | {shape} | | refused | {words} | |"
    seconds = f"{sum(found.seconds):.1f}" if found.seconds else ""
    return f"| {name} | {shape} | {found.millions} | {found.groups} of {found.units} | {found.whole} | {seconds} |"


def lines(page: str) -> dict[str, str]:
    """{network: its line} of a page."""
    rows = page.partition(START)[2].partition(STOP)[0].strip().splitlines()[2:]
    return {row.split("|")[1].strip(): row for row in rows}


def write(rows: dict[str, str]) -> None:
    """Put these lines in the place of the page's; those of networks that are not in the table go."""
    page = PAGE.read_text()
    merged = {**lines(page), **rows}
    kept = [merged[name] for name in MODELS if name in merged]
    head = ["| network | input | million parameters | groups of units | what stays whole | seconds |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    before, after = page.partition(START)[0], page.partition(STOP)[2]
    PAGE.write_text("\n".join([before + START, *head, *kept, STOP + after]))


def run(names: Iterable[str], report: bool) -> int:
    """Check networks one after the other; returns how many were not as expected."""
    wrong, rows = 0, {}
    for name in names:
        model = MODELS[name]
        try:
            found = outcome(model)
        except AssertionError as error:
            found = f"a gate fails: {error}"
        late = not isinstance(found, str) and sum(found.seconds) > SLOW
        expected = (
            model.refused in found
            if isinstance(found, str) and model.refused
            else isinstance(found, gates.Row)
        )
        wrong += late or not expected
        rows[name] = told(name, model, found)
        times = "" if isinstance(found, str) else " + ".join(f"{s:.1f}" for s in found.seconds)
        sys.stdout.write(
            f"{'ok  ' if expected and not late else 'BAD '} {rows[name]} ({times}; {gates.peak_gigabytes():.1f} GB)\n"
        )
        sys.stdout.flush()
        if not report:
            write({name: rows[name]})
        gc.collect()
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="leave the page alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    names = [name for name, model in MODELS.items() if model.quick or not given.quick]
    patterns = given.names or ["*"]
    chosen = [name for name in names if any(fnmatch.fnmatch(name, own) for own in patterns)]
    sys.exit(run(chosen, given.report))


if __name__ == "__main__":
    main()
