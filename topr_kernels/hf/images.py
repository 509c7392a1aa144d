"""Images of records: what they may be, and what the model's processor makes of them.

Records keep images as they are given (paths, bytes, PIL images), never as tensors. The processor expands
the placeholder of an image into its tokens when records are prepared, and makes the tensors when a batch
is collated. Both run the same call, and the tokens of a record are compared with it each time.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate, groupby
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from topr_kernels.hf.fields import IMAGES, plain

#: Entry of a batch with images: the number of images of each record, [B] int64. Such a batch has no
#: positions of its own.
COUNTS = "image_counts"
#: What a processor returns beside tensors of images. Kinds of tokens are computed here, from token ids.
_OF_TEXT = ("input_ids", "attention_mask")
KINDS = ("mm_token_type_ids", "token_type_ids")
#: Tensors of images, without a dimension of tokens.
TENSORS = frozenset(
    {
        "pixel_values",
        "pixel_mask",
        "pixel_attention_mask",
        "image_grid_thw",
        "image_sizes",
        "spatial_shapes",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
        "high_res_pixel_values",
        "batch_num_images",
    }
)
_ACCEPTED = "expected a path, bytes of an image file, a data: URL in base64, or a PIL image"


def is_processor(processing_class: Any) -> bool:
    """Whether something is a processor of text and images, and no plain tokenizer."""
    return all(hasattr(processing_class, name) for name in ("image_processor", "tokenizer"))


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is returned as it is."""
    return processing_class.tokenizer if is_processor(processing_class) else processing_class


def images_of(record: Mapping[str, Any], where: str) -> list[Any]:
    """The images of a record as they were given, [] if it has none.

    Raises:
        TypeError: if the field is not a list, or holds something else than images.
    """
    images = plain(record.get(IMAGES))
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        raise TypeError(
            f"{where}, field {IMAGES!r}: got a {type(images).__name__}; expected a list of images, of a "
            f"single one [image]; {_ACCEPTED}"
        )
    for k, image in enumerate(images):
        if not _is_image(image):
            raise TypeError(f"{where}, {_named(k)}: got a {type(image).__name__}; {_ACCEPTED}")
    return list(images)


def has_images(dataset: Any) -> bool:
    """Whether a data set is known to have images; of a stream that is whether it has the column."""
    return any(_with_images(dataset))


def all_have_images(dataset: Any) -> bool:
    """Whether each record of a data set that ``has_images`` has some; it is read for that."""
    return all(_with_images(dataset))


def _with_images(dataset: Any) -> Iterator[bool]:
    """Whether each record has images; what has no length says it once, by its columns."""
    if isinstance(dataset, list):
        return (isinstance(record, Mapping) and _any_of(record.get(IMAGES)) for record in dataset)
    if IMAGES not in (getattr(dataset, "column_names", None) or ()):
        return iter([False])
    return map(_any_of, dataset[IMAGES]) if hasattr(dataset, "__len__") else iter([True])


def _any_of(images: Any) -> bool:
    return images is not None and len(images) > 0


def opened(image: Any, k: int, where: str) -> Any:
    """An image in RGB, upright as its file says, as a PIL image.

    Args:
        image: a path, bytes, a data URL, a PIL image, or ``datasets``' mapping of bytes and path.
        k: its number in the record.
        where: names the record in messages.

    Raises:
        ValueError: if it cannot be read.
    """
    pil, ops = _pil()
    with _naming(k, where):
        picture = image if isinstance(image, pil.Image) else pil.open(_source(image))
        return ops.exif_transpose(picture).convert("RGB")


def check_readable(image: Any, k: int, where: str) -> None:
    """Raises ``ValueError`` as ``opened``, if there is no image; its pixels are not read."""
    if isinstance(image, (str, bytes, PathLike, Mapping)):
        with _naming(k, where):
            _pil()[0].open(_source(image)).close()


@contextmanager
def _naming(k: int, where: str) -> Iterator[None]:
    """Has an error name an image."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    # Decoders raise errors of any type.
    except Exception as error:
        raise ValueError(
            f"{where}, {_named(k)}: cannot be read ({type(error).__name__}: {error}); {_ACCEPTED} that "
            "this machine can open; download what is elsewhere, or leave the record out"
        ) from error


def take_images(
    messages: Sequence[Mapping[str, Any]], name: str, where: str
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages whose image parts are bare placeholders, and the images that stood in them.

    Args:
        messages: of the prompt or of the completion.
        name: of their field.
        where: names the record in messages.

    Returns:
        The messages for a chat template, and an entry for each placeholder: the image of the part, or
        None if it holds none, so that the record's field ``images`` has it.

    Raises:
        TypeError: if a part holds something else than an image.
        ValueError: if a message of the assistant holds an image.
    """
    bare, images = [], []
    for message in messages:
        parts = message.get("content")
        if not isinstance(parts, (list, tuple)):
            bare.append(dict(message))
            continue
        content = []
        for part in parts:
            if not is_image_part(part):
                content.append(part)
                continue
            if message["role"] == "assistant":
                raise ValueError(
                    f"{where}, field {name!r}: got a message of the assistant with an image; expected "
                    "text, a policy's images are no tokens of its vocabulary; leave the record out"
                )
            image = _of_part(part)
            if image is not None and not _is_image(image):
                raise TypeError(
                    f"{where}, field {name!r}: got an image part with a {type(image).__name__}; "
                    f"{_ACCEPTED}"
                )
            images.append(image)
            content.append({"type": "image"})
        bare.append({**message, "content": _said(message["role"], content)})
    return bare, images


def _said(role: str, parts: list[Any]) -> Any:
    """The content of a message; the assistant's text as such, which is then read as it wrote it."""
    alone = parts[0] if role == "assistant" and len(parts) == 1 else None
    if isinstance(alone, Mapping) and alone.get("type") == "text":
        return alone.get("text")
    return parts


def matched(parts: Sequence[Any], given: Sequence[Any], where: str) -> list[Any]:
    """The images of a record in the order of its placeholders.

    Args:
        parts: as ``take_images`` of prompt and completion.
        given: the record's field ``images``.
        where: names the record in messages.

    Raises:
        ValueError: if there are more or fewer images in the field than parts without one.
    """
    bare = sum(image is None for image in parts)
    if bare != len(given):
        raise ValueError(
            f"{where}, field {IMAGES!r}: holds {len(given)} images for {bare} image parts of the "
            "messages that hold none themselves; expected one for each, in their order: write a part "
            "{'type': 'image'} where each belongs"
        )
    rest = iter(given)
    return [next(rest) if image is None else image for image in parts]


def is_image_part(part: Any) -> bool:
    """Whether a part of a message's content is an image."""
    if not isinstance(part, Mapping):
        return False
    kind = part.get("type")
    if kind is None:
        return any(part.get(name) is not None for name in ("image", "image_url"))
    return kind in ("image", "image_url", "input_image")


class ImageInputs:
    """What a model's processor makes of images; can be sent to other processes.

    Args:
        processor: of the model, as ``AutoProcessor`` loads it.

    Raises:
        ValueError: if it has no token that stands for an image in a text.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.placeholder: str = getattr(processor, "image_token", None) or ""
        if not self.placeholder:
            raise ValueError(
                f"processor: got a {type(processor).__name__}, which has no image_token to stand for an "
                "image in a text; expected one that has, or records without images and its tokenizer"
            )
        if self.tokenizer.pad_token is None:
            raise ValueError(
                "processor: its tokenizer has no pad token, which it needs for several texts; set "
                "processor.tokenizer.pad_token = processor.tokenizer.eos_token"
            )

    @property
    def chat_template(self) -> str | None:
        """The processor's own chat template, if it has one."""
        template = getattr(self.processor, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        return template

    def expansions(self, images: Sequence[Any], where: str) -> list[str]:
        """The text that the processor writes for each image of a record in the place of its token.

        Raises:
            ValueError: if an image cannot be read or processed, or the processor does not tell.
        """
        if not images:
            return []
        inputs = self._processed([images], [where], return_text_replacement_offsets=True)
        replaced = inputs.get("text_replacement_offsets")
        if replaced is None:
            raise ValueError(
                f"{where}: {type(self.processor).__name__} does not tell what it writes in the place of "
                "an image (return_text_replacement_offsets); give prompt_token_ids and "
                "completion_token_ids as the model saw them"
            )
        return [x["replacement"] for x in replaced[0]]

    def check_written(
        self, ids: Sequence[int], mask: Sequence[int], first: int, where: str
    ) -> None:
        """Raises ``ValueError`` if the policy is said to have written tokens of an image.

        Args:
            ids: of the completion.
            mask: 1 where the policy wrote it.
            first: position of the completion's first token, for the message.
            where: names the record in messages.
        """
        for k, (token, own) in enumerate(zip(ids, mask, strict=True)):
            if own and token in self.tokens:
                raise ValueError(
                    f"{where}, field 'completion_token_ids': has the image token {token} at position "
                    f"{k} ({first + k} of the sequence), which no policy writes; expected 0 for it in "
                    "completion_mask, or leave the record out"
                )

    def check_runs(self, ids: Sequence[int], expected: Sequence[int], where: str) -> None:
        """Raises ``ValueError`` unless the image tokens of a record are those of its images.

        Args:
            ids: of prompt and completion.
            expected: length of each run of image tokens that the processor makes of the images.
            where: names the record in messages.
        """
        runs = self.runs(ids)
        # Images without anything between them are one run.
        ends = list(accumulate(runs))
        if sum(runs) == sum(expected) and set(ends) <= set(accumulate(expected)):
            return
        if not expected:
            raise ValueError(
                f"{where}: has {sum(runs)} image tokens, but no {IMAGES}; expected none: give the "
                "images, or leave the record out (a policy may sample such tokens: forbid them)"
            )
        raise ValueError(
            f"{where}, field {IMAGES!r}: the processor makes runs of {list(expected)} image tokens of "
            f"them, but the token ids have {runs}; expected these images in this order, the ids as the "
            "model saw them (with all tokens of an image, not one placeholder; a chat template must "
            "write each), and the processor with the settings that the ids were made with"
        )

    def runs(self, ids: Sequence[int]) -> list[int]:
        """Lengths of the runs of image tokens."""
        return [len(list(run)) for inside, run in groupby(ids, self.tokens.__contains__) if inside]

    def tensors(
        self, images: Sequence[Sequence[Any]], wheres: Sequence[str]
    ) -> tuple[dict[str, Tensor], list[list[int]]]:
        """Tensors of the images of several records, all together as the model takes them.

        Args:
            images: of each record, at least one.
            wheres: name the records in messages.

        Returns:
            What the processor returns beside text (``pixel_values``, ``image_grid_thw``, ...), and for
            each record the lengths of its runs of image tokens.

        Raises:
            ValueError: if an image cannot be read or processed, or the processor returns something else.
        """
        inputs = self._processed(images, wheres, return_tensors="pt", padding=True)
        rows = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        tensors = {n: x for n, x in inputs.items() if n not in (*_OF_TEXT, *KINDS)}
        unknown = sorted(set(tensors) - TENSORS)
        if unknown:
            raise ValueError(
                f"processor: {type(self.processor).__name__} returns {', '.join(unknown)}, of which it "
                "is not known how they belong to tokens; write a data_collator for this model"
            )
        return tensors, [self.runs(row) for row in rows]

    def kinds(self, ids: Sequence[int]) -> dict[str, list[int]]:
        """Kinds of tokens, under the name that the processor has for them; {} if it tells none."""
        return {name: [kinds.get(x, 0) for x in ids] for name, kinds in self._kinds.items()}

    @cached_property
    def tokens(self) -> frozenset[int]:
        """Ids in whose place the model puts the features of images."""
        for kinds in self._kinds.values():
            return frozenset(kinds)
        return frozenset([int(self.processor.image_token_id)])

    @cached_property
    def _kinds(self) -> dict[str, dict[int, int]]:
        """For each name of kinds of tokens: the kind of each id that is not text."""
        blank = _pil()[0].new("RGB", (64, 64))
        inputs = self._processed([[blank]], ["a blank image"])
        ids = inputs["input_ids"][0]
        kinds = {}
        for name in KINDS:
            pairs = set(zip(ids, inputs.get(name, [[0] * len(ids)])[0], strict=True))
            other = {token: kind for token, kind in pairs if kind}
            # All zeros: the tokenizer's own default, which these models do not take.
            if other:
                if any((token, 0) in pairs for token in other):
                    raise ValueError(
                        f"processor: {type(self.processor).__name__} gives one token id several kinds "
                        f"({name}), which is not known here; write a data_collator for this model"
                    )
                kinds[name] = other
        return kinds

    def _processed(
        self, images: Sequence[Sequence[Any]], wheres: Sequence[str], **options: Any
    ) -> Any:
        """The processor's inputs for records that hold nothing but their images."""
        shown = [
            [opened(image, k, where) for k, image in enumerate(part)]
            for part, where in zip(images, wheres, strict=True)
        ]
        # A space keeps two images apart.
        text = [" ".join([self.placeholder] * len(part)) for part in shown]
        try:
            return self.processor(images=shown, text=text, add_special_tokens=False, **options)
        except Exception as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for part in shown for image in part)
            raise ValueError(
                f"{wheres[0]}{f' to {wheres[-1]}' if len(wheres) > 1 else ''}, field {IMAGES!r}: "
                f"{type(self.processor).__name__} failed on images of {sizes} pixels "
                f"({type(error).__name__}: {error}); leave them out, or give it other settings"
            ) from error


def image_inputs(processing_class: Any) -> ImageInputs | None:
    """``ImageInputs`` of a processor; None of a tokenizer."""
    return ImageInputs(processing_class) if is_processor(processing_class) else None


def right_aligned_kinds(
    vision: ImageInputs, sequences: Sequence[Sequence[int]], width: int
) -> dict[str, Tensor]:
    """Kinds of the tokens of B sequences, [B, T] int64 under the processor's name, 0 in padding."""
    rows = [vision.kinds(sequence) for sequence in sequences]
    result = {}
    for name in rows[0]:
        result[name] = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            result[name][i, width - len(row[name]) :] = torch.tensor(row[name])
    return result


def _is_image(image: Any) -> bool:
    if isinstance(image, Mapping):
        return set(image) <= {"bytes", "path"} and any(x is not None for x in image.values())
    # By its modules, since Pillow may not be installed.
    kinds = (f"{kind.__module__}.{kind.__name__}" for kind in type(image).__mro__)
    return isinstance(image, (str, bytes, PathLike)) or "PIL.Image.Image" in kinds


def _source(image: Any) -> Any:
    """What PIL opens: a path, or a file of bytes."""
    if isinstance(image, Mapping):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if isinstance(image, str) and image.startswith("data:"):
        head, _, payload = image.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(f"a data URL of {head[5:60]!r}; expected base64")
        return io.BytesIO(base64.b64decode(payload, validate=True))
    return image


def _of_part(part: Mapping[str, Any]) -> Any:
    """The image of a part of a message; None if the record's field holds it."""
    for name in ("image", "image_url", "path", "url", "bytes", "base64", "data"):
        value = part.get(name)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        if value is None:
            continue
        if name in ("base64", "data") and isinstance(value, str) and not value.startswith("data:"):
            return f"data:;base64,{value}"
        return value
    return None


def _named(k: int) -> str:
    return f"field {IMAGES!r}, number {k}"


def _pil() -> tuple[Any, Any]:
    """Pillow's modules for images and their orientation.

    Raises:
        ModuleNotFoundError: naming the extra that installs it.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'images need Pillow: pip install "topr_kernels[images]" (and, for some processors, the '
            "torchvision that belongs to your torch)"
        ) from error
    return Image, ImageOps
