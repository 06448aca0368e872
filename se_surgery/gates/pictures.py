"""Pictures: a folder of images, or a data set that timm knows by name, as batches for a model.

In: a model and the name of the data. Out: `Pictures`, a loader of images and labels, scaled, cropped and normalised as
the model's configuration says (timm's evaluation transform). An image that cannot be read is an error that names it:
timm's own data sets take the next one in its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from ..errors import DataError, OptionError, SurgeryError
from ..reading.look import look

# What timm's names of data sets begin with.
SCHEMES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
# What folders with a part of a data set are called.
_PARTS = {"train", "training", "val", "valid", "validation", "eval", "evaluation", "test", "testing"}
_MODES = {1: "L", 3: "RGB"}
# What to do where a data set by name, or a folder, cannot be opened.
_REMEDIES = ("See to its root and split, or ask for download.", "See to what is in it, to the split and the class map.")


@dataclass(frozen=True)
class Pictures:
    """Batches of images, and of labels where the data has classes. May be gone through any number of times.

    Attributes:
        loader: Gives the batches, or in the place of one the error that reading it came to.
        classes: The names of the classes in the order of their labels; empty where they are not known.
        where: What the data is, for people.
        has_labels: Whether it has classes at all; a folder of images alone has none.
    """

    loader: DataLoader[Any]
    classes: tuple[str, ...]
    where: str
    has_labels: bool = True

    def __iter__(self) -> Iterator[Any]:
        given = iter(self.loader)
        failure: SurgeryError | None = None
        while failure is None:
            try:
                batch = next(given, None)
            except Exception as error:  # whatever a data set's own code raises
                failure = DataError(f"{self.where} cannot be read ({_told(error)}). See to the data.")
                break
            if batch is None:
                return
            if isinstance(batch, SurgeryError):
                failure = batch
            else:
                yield batch
        # Before the error keeps them alive: worker processes that end late are waited for.
        del given
        raise failure

    def __len__(self) -> int:
        return len(self.loader)


def open_pictures(
    model: nn.Module,
    data: str,
    *,
    root: str | os.PathLike[str] | None = None,
    split: str = "validation",
    class_map: str | os.PathLike[str] | None = None,
    download: bool = False,
    batch_size: int = 64,
    images: int | None = None,
    workers: int = 0,
    example_input: Any = None,
) -> Pictures:
    """Open a folder of images or one of timm's data sets for a model.

    Args:
        model: The model that the images are for.
        data: A folder, with one folder of images for each class, or with images alone; or timm's name of a data set:
            `torch/cifar10`, `hfds/USER/NAME`, `wds/NAME`, ...
        root: Where the files of a data set by name are.
        split: Which part of it; in a folder, that folder in it. One without folders for parts is taken as it is.
        class_map: A text file with the name of a class in every line, in the order of the model's labels; folders of
            other names are left out. By default all are taken, in natural order, as timm has it.
        download: Fetch a data set by name that is not there yet, where timm can.
        batch_size: Images at a time.
        images: How many images to take, evenly spread over the data; all by default.
        workers: Processes that read images.
        example_input: (C, H, W) or a tensor, the size of the images. By default what fits the model.

    Raises:
        OptionError: There is no such data, or an option means nothing.
        DataError: The data holds no images, or cannot be read.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("images", images, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise OptionError(f"{name}={value!r} is below {least}. Give a larger number.")
    size = tuple(getattr(look(model, example_input).asked[0], "shape", ())[1:])
    transform = _transform(model, size)
    if class_map is not None and not Path(class_map).is_file():
        raise OptionError(f"{str(class_map)!r} is no file. Name one with the name of a class in every line.")
    given = {
        "class_map": str(class_map) if class_map is not None else "",
        "batch_size": batch_size,
        "download": download,
    }
    found, where = _found(data, root, split, **given, input_img_mode=_MODES[size[0]])
    classes = _classes(found)
    has_labels = classes != ("",)
    if isinstance(found, IterableDataset):
        if images is not None:
            raise OptionError(f"images={images!r} means nothing for {where}, which is a stream. Leave it out.")
        found.transform = transform  # type: ignore[attr-defined]
        pictures: Any = found
    else:
        if not len(found):  # type: ignore[arg-type]
            raise DataError(f"{where} holds no images. Name data that does.")
        pictures = _spread(_Pictures(found, transform, _MODES[size[0]], where, has_labels), images)
    loader: DataLoader[Any] = DataLoader(pictures, batch_size, num_workers=workers, collate_fn=_collate)
    return Pictures(loader, classes if has_labels else (), where, has_labels)


def _transform(model: nn.Module, size: tuple[int, ...]) -> Any:
    """The transform that timm evaluates a model with."""
    timm_data = _timm_data()
    if len(size) != 3 or size[0] not in _MODES:
        raise OptionError(
            f"The model takes inputs of shape {size}, and images have 1 or 3 channels. Give such a model."
        )
    config = timm_data.resolve_model_data_config(model, args={"input_size": size})
    for name in ("mean", "std"):
        values = config[name]
        if len(values) != size[0]:
            # A configuration of colours, and a model of one channel.
            config[name] = (sum(values) / len(values),) * size[0]
    return timm_data.create_transform(**config, is_training=False)


def _timm_data() -> Any:
    try:
        import timm.data
    except ImportError as error:
        raise SurgeryError(
            f"Reading images needs torchvision ({error}). Install it with: pip install 'se-surgery[torchvision]'."
        ) from error
    return timm.data


def _found(data: str, root: Any, split: str, **options: Any) -> tuple[Dataset[Any], str]:
    """The data set as timm opens it, and what it is called."""
    is_folder = Path(data).is_dir()
    if not is_folder and not data.lower().startswith(SCHEMES):
        raise OptionError(
            f"{data!r} is neither a folder nor timm's name of a data set, which begins with one of "
            f"{', '.join(SCHEMES)}. Name one of these."
        )
    source = {"name": "", "root": data} if is_folder else {"name": data, "root": root}
    try:
        dataset: Dataset[Any] = _timm_data().create_dataset(**source, split=split, **options)
    except SurgeryError:
        raise
    except ImportError as error:
        raise DataError(f"{data!r} cannot be opened ({_told(error)}). Install the package that reads it.") from error
    except Exception as error:  # what the readers of other packages raise has no class in common
        raise DataError(f"{data!r} cannot be opened ({_told(error)}). {_REMEDIES[is_folder]}") from error
    folder = getattr(getattr(dataset, "reader", None), "root", None)
    parts = _parts(Path(data)) if is_folder and folder is not None and Path(folder) == Path(data) else []
    if parts:  # timm takes all of a folder without that part, the images to train on among them
        raise OptionError(
            f"{data!r} has no part {split!r}. It has {', '.join(parts)}: name one as split, or in the path."
        )
    return dataset, repr(str(folder)) if is_folder and folder else repr(data)


def _parts(folder: Path) -> list[str]:
    """The folders in a folder that are called as parts of a data set are, and hold a folder for each class."""
    inside = sorted(path for path in folder.iterdir() if path.name.lower() in _PARTS and path.is_dir())
    return [path.name for path in inside if any(child.is_dir() for child in path.iterdir())]


def _told(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _classes(dataset: Any) -> tuple[str, ...]:
    """The names of a data set's classes, by their labels; one without a name where it is a folder of images alone."""
    labels = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if not isinstance(labels, dict) or sorted(labels.values()) != list(range(len(labels))):
        return ()
    return tuple(str(name) for name in sorted(labels, key=labels.__getitem__))


def _spread(pictures: Dataset[Any], limit: int | None) -> Dataset[Any]:
    number = len(pictures)  # type: ignore[arg-type]
    if limit is None or limit >= number:
        return pictures
    return Subset(pictures, [i * number // limit for i in range(limit)])


class _Pictures(Dataset[Any]):
    """The images of a data set that can be asked for by number, each an error where it cannot be read."""

    def __init__(self, dataset: Any, transform: Any, mode: str, where: str, has_labels: bool) -> None:
        self.dataset, self.transform, self.mode = dataset, transform, mode
        self.where, self.has_labels = where, has_labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        try:
            picture, label = self._read(i)
            image = self.transform(picture.convert(self.mode))
        except Exception as error:  # whatever a decoder raises for what is no image
            return DataError(f"{self._name(i)} cannot be read as an image ({_told(error)}). Take it out, or mend it.")
        return (image, label) if self.has_labels else image

    def _read(self, i: int) -> tuple[Any, Any]:
        from PIL import Image

        reader = getattr(self.dataset, "reader", None)
        if reader is None:
            return self.dataset[i]  # type: ignore[no-any-return]
        file, label, *_ = reader[i]
        with file:
            picture = Image.open(file)
            picture.load()
        return picture, label

    def _name(self, i: int) -> str:
        reader = getattr(self.dataset, "reader", None)
        try:
            return repr(str(reader.filename(i, absolute=True)))  # type: ignore[union-attr]
        except Exception:  # not every reader has names
            return f"Image {i} of {self.where}"


def _collate(samples: Sequence[Any]) -> Any:
    """A batch; or the first error among its images, which a worker process would otherwise wrap in a traceback."""
    broken = next((sample for sample in samples if isinstance(sample, SurgeryError)), None)
    if broken is not None:
        return broken
    return default_collate(list(samples))
