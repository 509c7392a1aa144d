"""Counts the squares in a picture, trained offline with TOPR: ``python examples/images.py``.

The pictures are drawn here and answered by guessing, so log mu is known: the logarithm of one in four.
A tiny LLaVA, random at first, learns to count from these guesses and their rewards alone.
"""

import math
import random

import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers

from topr_kernels.hf import TOPRConfig, TOPRTrainer

QUESTION, MOST, SIDE = "<image> how many ?", 4, 24


def draw(count, draws):
    """A picture with that many squares on a grid of nine places."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    for place in draws.sample(range(9), count):
        x, y = 8 * (place % 3) + 1, 8 * (place // 3) + 1
        ImageDraw.Draw(image).rectangle((x, y, x + 5, y + 5), fill="black")
    return image


def tiny():
    """A random LLaVA and its processor; of others ``from_pretrained`` loads both."""
    words = ["<eos>", "<image>", "how", "many", "?", *map(str, range(1, MOST + 1))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"eos_token": "<eos>", "pad_token": "<eos>", "extra_special_tokens": ["<image>"]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **ends)
    pixels = transformers.CLIPImageProcessor(size=(SIDE, SIDE), crop_size=(SIDE, SIDE))
    cut = {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    shape = {**layers, "intermediate_size": 64, "vocab_size": len(words)}
    sees = {**shape, "model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 8}
    reads = {**shape, "model_type": "llama", "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.LlavaConfig(text_config=reads, vision_config=sees, image_token_id=1)
    model = transformers.LlavaForConditionalGeneration(config)
    return model, transformers.LlavaProcessor(pixels, tokenizer, 8, **cut)


@torch.no_grad()
def share_right(model, processor, pictures):
    """How many of the pictures the model counts right, greedily."""
    images, counts = zip(*pictures, strict=True)
    inputs = processor(list(images), [QUESTION] * len(images), return_tensors="pt")
    said = model.eval()(inputs["input_ids"], inputs["pixel_values"]).logits[:, -1].argmax(-1)
    words = processor.tokenizer.convert_ids_to_tokens(said.tolist())
    return sum(w == str(n) for w, n in zip(words, counts, strict=True)) / len(counts)


def main(pictures=512, epochs=8):
    """Draws pictures, guesses, trains, and counts in 64 pictures that were not trained on."""
    torch.manual_seed(0)
    (model, processor), draws = tiny(), random.Random(0)
    counts = draws.choices(range(1, MOST + 1), k=64 + pictures)
    drawn, records = [(draw(n, draws), n) for n in counts], []
    for image, count in drawn[64:]:
        guess = draws.randint(1, MOST)
        said = {"prompt": QUESTION, "images": [image], "completion": f" {guess}"}
        mu = {"behavior_log_prob": [-math.log(MOST), 0.0]}  # of the guess, and of the end of text
        records.append({**said, **mu, "reward": 1.0 if guess == count else -1.0})
    settings = {"num_train_epochs": epochs, "learning_rate": 2e-3, "use_cpu": True}
    settings |= {"per_device_train_batch_size": 32, "report_to": "none", "save_strategy": "no"}
    trainer = TOPRTrainer(model, TOPRConfig(**settings), None, records, processing_class=processor)
    before = share_right(model, processor, drawn[:64])
    trainer.train()
    after = share_right(model, processor, drawn[:64])
    print(f"right of 64 pictures: {before:.0%} before, {after:.0%} after")
    return before, after


if __name__ == "__main__":
    main()
