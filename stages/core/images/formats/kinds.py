"""The readers of data sets in their official formats, by `data.kind`."""

from stages.core.images.archives import Archive
from stages.core.images.formats import birds, cifar, dogs, domainnet, folder, imagenet, pets
from stages.core.images.formats.listing import Listing
from stages.core.settings.datasets import HOMES
from stages.core.settings.profiles import Data


def read_listing(archive: Archive, data: Data) -> Listing:
    """List a data set's images. Raises InputError for an archive that is not of ``data.kind``."""
    title = HOMES[data.kind]
    if data.kind == "folder":
        return folder.read(archive)
    if data.kind == "domainnet":
        return domainnet.read(archive, str(data.domain), title)
    return {
        "cifar10": cifar.read_ten,
        "cifar100": cifar.read_hundred,
        "pets": pets.read,
        "cub": birds.read,
        "nabirds": birds.read,
        "dogs": dogs.read,
        "imagenet": imagenet.read,
    }[data.kind](archive, title)
