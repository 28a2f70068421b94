"""Policies that see images: as `GRPOTrainer` trains them, with a critic that sees what they see."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from helpers import settings, tiny_settings, variety
from PIL import Image as Picture
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)
from trl import GRPOConfig, GRPOTrainer

from trl_ext import PPOConfig, PPOTrainer, ReinforceConfig, ReinforceTrainer, load_critic
from trl_ext.packing.layout import last_states


TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}"
    "{% endif %}{% endfor %}{{ ' it' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def seeing(tokenizer, tmp_path_factory):
    """Folder of a tiny LLaVA-NeXT, and its processor."""
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    own.add_special_tokens({"additional_special_tokens": ["<image>"]})
    grid = [[28, 56], [56, 28], [56, 56]]
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grid
    )
    processor = LlavaNextProcessor(
        pictures,
        own,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    eyes = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    text = LlamaConfig(**tiny_settings(own) | {"initializer_range": 0.3, "max_position_embeddings": 256})
    index = own.convert_tokens_to_ids("<image>")
    config = LlavaNextConfig(vision_config=eyes, text_config=text, image_token_index=index, image_grid_pinpoints=grid)
    folder = str(tmp_path_factory.mktemp("seeing"))
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures():
    draw = np.random.default_rng(0)
    rows = [Picture.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(4)]
    features = Features({"prompt": [{"role": Value("string"), "content": Value("string")}], "image": Image()})
    prompt = [{"role": "user", "content": "the film was"}]
    return Dataset.from_dict({"prompt": [prompt] * 4, "image": rows}, features=features)


def trained(trainer_class, config_class, seeing, pictures, folder, **overrides):
    own = settings(folder, num_generations=2, max_completion_length=4, **overrides)
    if config_class is GRPOConfig:
        del own["critic_learning_rate"]
    trainer = trainer_class(seeing, variety, config_class(**own), pictures)
    trainer.train()
    return trainer


def test_reinforce_trains_as_grpo_does(seeing, pictures, tmp_path):
    # A loss that TRL does not divide by the number of the batch's tokens, which ours, of past ones, is not
    common = {"scale_rewards": "group", "loss_type": "dr_grpo"}
    theirs = trained(GRPOTrainer, GRPOConfig, seeing, pictures, tmp_path, **common)
    own = common | {"baseline": "none", "scale_advantages": False}  # an epoch: the next is shuffled otherwise
    ours = trained(ReinforceTrainer, ReinforceConfig, seeing, pictures, tmp_path, **own)
    start = LlavaNextForConditionalGeneration.from_pretrained(seeing).state_dict()
    moved = [name for name, weight in theirs.model.state_dict().items() if not torch.equal(weight, start[name])]
    assert any("language_model" in name for name in moved)
    for name, weight in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_critic_sees_the_image(seeing, pictures, tmp_path, critic):
    """Values of the same words beside two images differ, and are what the critic on disk says."""
    own = {"critic": critic, "num_iterations": 2, "gradient_checkpointing": critic == "shared", "max_steps": 4}
    trainer = trained(PPOTrainer, PPOConfig, seeing, pictures, tmp_path, **own)
    trainer.save_model()
    policy = LlavaNextForConditionalGeneration.from_pretrained(tmp_path)
    saved = load_critic(policy, str(tmp_path))
    in_training, from_disk = [], []
    for row in (0, 1):
        inputs = trainer.processing_class(
            images=pictures[row]["image"], text="<image> the film was good", return_tensors="pt"
        )
        with torch.no_grad():
            forward = trainer.forward(trainer.model.eval(), **inputs, num_images=[1], logits_to_keep=2)
            layout = last_states(**inputs, num_states=3)
            states = policy.base_model(**inputs).last_hidden_state if saved.reads_policy else None
            from_disk.append(saved(policy, states, layout))
        in_training.append(forward.values)
    torch.testing.assert_close(in_training, from_disk, atol=1e-5, rtol=1e-4)
    assert (from_disk[0] - from_disk[1]).abs().max() > 1e-3
