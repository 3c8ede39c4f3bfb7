"""The readers of data sets in their official formats, by `data.kind`."""

from stages.core.archive import Archive
from stages.core.formats import birds, cifar, dogs, domainnet, folder, imagenet, pets
from stages.core.formats.listing import Listing
from stages.core.homes import HOMES
from stages.core.profiles import Data


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
