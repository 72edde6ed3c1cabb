"""The named datasets: geometry, normalisation constants, class lists and possible locations of their files.

Means and standard deviations are those of the DC/DSA/DM code family, which every paper's numbers use. The
ImageNet subsets are those of Table 1 of the DataDAM supplement, classes in its order.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

_PerChannel = tuple[float, ...]
_IDX: Final = "raw/train-images-idx3-ubyte"
_DIGITS: Final = "0,1,2,3,4,5,6,7,8,9"


@dataclass(frozen=True)
class KnownDataset:
    """Fixed properties of a named dataset."""

    shape: tuple[int, int, int]  # (C, H, W) in which it is used
    mean: _PerChannel = ()  # empty: computed from train
    std: _PerChannel = ()  # likewise
    can_flip: bool = True  # whether a mirrored image keeps its class
    resize: bool = False  # whether other sizes are resized (short side, then centre crop) or refused
    torchvision: str | None = None  # the class that reads and downloads it, if any
    marker: str = ""  # path below the root by which torchvision's layout is recognised
    folders: tuple[str, ...] = ()  # other names of its folder below the data directory
    # How its files lie there, if neither as parquet shards nor as an image folder: `wavs` by class, the
    # official files of `cub` or `dogs`; `sklearn` brings its own.
    layout: Literal["", "wavs", "cub", "dogs", "sklearn"] = ""
    class_names: tuple[str, ...] = ()  # one per label; empty: taken from the files
    wnids: tuple[str, ...] = ()  # WordNet ids of the class folders, in the order of the labels


def _listed(text: str) -> tuple[str, ...]:
    """Return what is between the commas of a text."""
    return tuple(entry.strip() for entry in text.split(",") if entry.strip())


def _imagenet(size: int, folders: tuple[str, ...], classes: str = "", **fields: Any) -> KnownDataset:
    """Return a member of the ImageNet family; `classes` lists WordNet ids with names in the labels' order."""
    pairs = [entry.split(None, 1) for entry in _listed(classes)]
    return KnownDataset(
        (3, size, size),
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        resize=True,
        folders=folders,
        class_names=tuple(name for _, name in pairs),
        wnids=tuple(wnid for wnid, _ in pairs),
        **fields,
    )


def _small(
    torchvision: str, marker: str, classes: str, mean: _PerChannel, std: _PerChannel, **fields: Any
) -> KnownDataset:
    """Return a dataset that torchvision reads: grey images of 28 px, or colour images of 32."""
    shape, names = (1, 28, 28) if len(mean) == 1 else (3, 32, 32), _listed(classes)
    return KnownDataset(shape, mean, std, torchvision=torchvision, marker=marker, class_names=names, **fields)


_IMAGENETTE: Final = """
n01440764 tench, n02102040 English springer, n02979186 cassette player, n03000684 chain saw,
n03028079 church, n03394916 French horn, n03417042 garbage truck, n03425413 gas pump, n03445777 golf ball,
n03888257 parachute
"""
_IMAGEWOOF: Final = """
n02096294 Australian terrier, n02093754 Border terrier, n02111889 Samoyed, n02088364 beagle,
n02086240 Shih-Tzu, n02089973 English foxhound, n02087394 Rhodesian ridgeback, n02115641 dingo,
n02099601 golden retriever, n02105641 Old English sheepdog
"""
_IMAGESQUAWK: Final = """
n01806143 peacock, n02007558 flamingo, n01818515 macaw, n02051845 pelican, n02056570 king penguin,
n01614925 bald eagle, n01843383 toucan, n01518878 ostrich, n01860187 black swan,
n01819313 sulphur-crested cockatoo
"""
_FASHION: Final = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
_CIFAR10: Final = "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
_CIFAR100: Final = """
apple, aquarium_fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge, bus,
butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud, cockroach, couch,
crab, crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, fox, girl, hamster, house, kangaroo,
keyboard, lamp, lawn_mower, leopard, lion, lizard, lobster, man, maple_tree, motorcycle, mountain, mouse,
mushroom, oak_tree, orange, orchid, otter, palm_tree, pear, pickup_truck, pine_tree, plain, plate, poppy,
porcupine, possum, rabbit, raccoon, ray, road, rocket, rose, sea, seal, shark, shrew, skunk, skyscraper,
snail, snake, spider, squirrel, streetcar, sunflower, sweet_pepper, table, tank, telephone, television,
tiger, tractor, train, trout, tulip, turtle, wardrobe, whale, willow_tree, wolf, woman, worm
"""

KNOWN: Final[dict[str, KnownDataset]] = {
    "digits": KnownDataset((1, 16, 16), can_flip=False, layout="sklearn", class_names=_listed(_DIGITS)),
    "mnist": _small("MNIST", f"MNIST/{_IDX}", _DIGITS, (0.1307,), (0.3081,), can_flip=False),
    "fashion_mnist": _small("FashionMNIST", f"FashionMNIST/{_IDX}", _FASHION, (0.2861,), (0.3530,)),
    "svhn": _small(
        "SVHN", "train_32x32.mat", _DIGITS, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), can_flip=False
    ),
    "cifar10": _small(
        "CIFAR10", "cifar-10-batches-py", _CIFAR10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    ),
    "cifar100": _small(
        "CIFAR100", "cifar-100-python", _CIFAR100, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "tiny_imagenet": _imagenet(64, ("tiny-imagenet-200", "tiny-imagenet")),
    "imagenet": _imagenet(64, ("ILSVRC2012", "imagenet-1k")),
    "imagenette": _imagenet(
        128, ("imagenette2", "imagenette2-320", "imagenette2-160"), _IMAGENETTE, torchvision="Imagenette"
    ),
    "imagewoof": _imagenet(128, ("imagewoof2", "imagewoof2-320", "imagewoof2-160"), _IMAGEWOOF),
    "imagesquawk": _imagenet(128, (), _IMAGESQUAWK),
    "cub200": _imagenet(64, ("CUB_200_2011",), layout="cub"),
    "stanford_dogs": _imagenet(64, ("StanfordDogs", "stanford-dogs"), layout="dogs"),
    "speech_commands_mini": KnownDataset(
        (1, 64, 64), can_flip=False, folders=("mini_speech_commands",), layout="wavs"
    ),
}

ALIASES: Final[dict[str, dict[str, Any]]] = {"imagenet224": {"base": "imagenet", "image_size": 224}}
"""Names of datasets in another size than the catalog's, and the references that they stand for."""
