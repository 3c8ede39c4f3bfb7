"""Recompute the statistics of every method's network: models/fit -> models/recalibrate."""

from stages.core.command import command
from stages.core.device import prepare
from stages.core.loading import load_calibration
from stages.core.network import load_merged
from stages.core.params import load_params
from stages.recalibrate.batchnorm import recompute_statistics


def main() -> None:
    params = load_params()
    device, section = prepare(params.device, params.threads), params.recalibrate
    batches = load_calibration(params, section.images, section.batch_size, device)
    for name, method in params.methods.items():
        network = load_merged(f"models/fit/{name}.safetensors", device)
        if method.recalibrate == "batchnorm":
            recompute_statistics(network, batches, progress=f"recalibrate {name}")
        network.save(f"models/recalibrate/{name}.safetensors")


if __name__ == "__main__":
    command(main)
