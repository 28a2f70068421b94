"""LM heads that scale or cap their logits: log-probabilities and values are those of the model's own logits."""

import logging

import pytest
import torch
from datasets import Dataset
from helpers import count_good, ranking_settings, recorded, settings, tiny_settings
from transformers import (
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    OPTConfig,
    RecurrentGemmaConfig,
    xLSTMConfig,
)
from transformers.models.auto import AutoModelForCausalLM

from trl_ext import (
    NLPOConfig,
    NLPOTrainer,
    PPOConfig,
    PPOTrainer,
    QActorCriticConfig,
    QActorCriticTrainer,
    RankingDPOConfig,
    RankingDPOTrainer,
)
from trl_ext.critic.heads import Estimate
from trl_ext.models.lm_head import logits_of


# With heads far from plain ones: cap, scale or divisor
HEADS = {
    "cohere": lambda common: CohereConfig(**common, logit_scale=0.1),
    "gemma2": lambda common: Gemma2Config(**common, head_dim=8, final_logit_softcapping=1.0),
    "gemma3": lambda common: Gemma3TextConfig(**common, head_dim=8, final_logit_softcapping=1.0),
    "granite": lambda common: GraniteConfig(**common, logits_scaling=8.0),
    "hyperclovax": lambda common: HyperCLOVAXConfig(**common, logits_scaling=0.1),
    "recurrent_gemma": lambda common: RecurrentGemmaConfig(
        **common, head_dim=8, logits_soft_cap=1.0, lru_width=16, block_types=("recurrent", "attention")
    ),
    "falcon_h1": lambda common: FalconH1Config(
        **common, lm_head_multiplier=0.1, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4
    ),
    "xlstm": lambda common: xLSTMConfig(
        **common | {"hidden_size": 64}, num_heads=2, qk_dim_factor=1.0, output_logit_soft_cap=1.0, chunk_size=4
    ),
    "opt": lambda common: OPTConfig(
        **common, ffn_dim=32, word_embed_proj_dim=16, do_layer_norm_before=True
    ),  # whose forward calls its trunk's decoder, not its trunk
}


def build(tokenizer, family, **overrides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HEADS[family](tiny_settings(tokenizer) | overrides)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    return model


@pytest.mark.parametrize("family", list(HEADS))
@torch.no_grad()
def test_logits_of_hidden_states_are_the_models(tokenizer, family):
    model = build(tokenizer, family).eval()
    ids = torch.tensor([[5, 9, 12, 7, 14, 6, 8, 11]])
    expected = model(input_ids=ids).logits[0].float()
    hidden_states = model.base_model(input_ids=ids).last_hidden_state[0]
    assert torch.equal(logits_of(model, hidden_states), expected)
    plain = model.get_output_embeddings()(hidden_states)
    assert family == "opt" or (plain - expected).abs().max() > 0.3  # the plain head is another


@torch.no_grad()
def own_distribution(model, batch, row, temperature):
    """Tokens of a completion and the policy's distributions `(T, V)`, by the model's own logits of the row unpadded."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
    logits = model.eval()(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return completion, (logits.float() / temperature).softmax(dim=-1)


@pytest.fixture
def even_prompts():
    """Prompts of one length, as RecurrentGemma has states of padding as well."""
    return Dataset.from_dict(
        {"prompt": ["the film was dull", "it was a good", "the ending is sad", "a slow plot and"]}
    )


def rolled_out(trainer_class, config_class, tokenizer, prompts, tmp_path, family, **overrides):
    """A trainer after one rollout whose update changed nothing, and the rollout's batch."""
    still = {"max_steps": 1, "learning_rate": 0.0, "critic_learning_rate": 0.0, "temperature": 0.7}
    args = config_class(**settings(tmp_path, **still, **overrides))
    model = build(tokenizer, family)
    trainer = recorded(trainer_class)(model, count_good, args, prompts, processing_class=tokenizer)
    return trainer, model


@pytest.mark.parametrize("family", ["cohere", "gemma2", "granite", "recurrent_gemma"])
def test_nlpo_masks_and_scores_by_the_models_own_logits(tokenizer, even_prompts, tmp_path, family):
    overrides = {"num_iterations": 2, "top_p_mask": 0.5, "min_tokens_to_keep": 1}
    trainer, model = rolled_out(NLPOTrainer, NLPOConfig, tokenizer, even_prompts, tmp_path, family, **overrides)
    trainer.train()
    (batch,) = trainer.rollouts
    for row in range(len(batch["completion_ids"])):
        # The masking policy is the policy as it is still, without temperature
        _, masking = own_distribution(model, batch, row, 1.0)
        tokens, policy = own_distribution(model, batch, row, 0.7)
        ordered = masking.sort(dim=-1, descending=True)
        kept = ordered.values.cumsum(dim=-1) - ordered.values < 0.5
        allowed = torch.zeros_like(kept).scatter(-1, ordered.indices, kept)
        allowed[:, tokenizer.all_special_ids] = True
        assert 0 < allowed.sum() < allowed.numel()
        policy = policy * allowed / (policy * allowed).sum(dim=-1, keepdim=True)
        expected = policy.gather(1, tokens.unsqueeze(1)).squeeze(1).log()
        actual = batch["old_per_token_logps"][row][: len(tokens)]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["cohere", "gemma2", "granite", "recurrent_gemma"])
def test_values_of_states_are_means_over_the_models_own_distribution(tokenizer, even_prompts, tmp_path, family):
    trainer, model = rolled_out(
        QActorCriticTrainer, QActorCriticConfig, tokenizer, even_prompts, tmp_path, family, num_iterations=2, q_rank=4
    )
    head = trainer.critic.value_head
    torch.nn.init.normal_(head.embedding, std=1.0)
    trainer.train()
    (batch,) = trainer.rollouts
    update = trainer.updates[-1]
    estimates = trainer._forward_of(trainer.model, update).values
    for row in range(len(update["completion_ids"])):
        tokens, policy = own_distribution(model, update, row, 0.7)
        prompt = update["prompt_ids"][row][update["prompt_mask"][row].bool()]
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.cat([prompt, tokens])[None]).last_hidden_state
            hidden = hidden[0, len(prompt) - 1 : -1]
            table = hidden @ head.weight.T + head.bias + hidden @ head.projection.T @ head.embedding.T
            table = head.mean + head.std * table
        expected = (policy * table).sum(dim=-1)
        torch.testing.assert_close(estimates[row, : len(tokens), Estimate.V].detach(), expected, atol=1e-4, rtol=1e-4)
        uniform = table.mean(dim=-1)
        assert (uniform - expected).abs().max() > 1e-2 * head.std  # the policy does matter
    assert batch["old_per_token_logps"] is not None


@pytest.mark.parametrize("compact_scoring", [True, False])
def test_a_head_that_trl_does_not_know_is_scored_as_it_is(tokenizer, even_prompts, tmp_path, caplog, compact_scoring):
    """RecurrentGemma's soft cap has a name of its own."""
    overrides = {"num_iterations": 2, "compact_scoring": compact_scoring}
    with caplog.at_level(logging.WARNING):
        trainer, model = rolled_out(
            PPOTrainer, PPOConfig, tokenizer, even_prompts, tmp_path, "recurrent_gemma", **overrides
        )
    trainer.train()
    (warning,) = [record for record in caplog.messages if "fused LM head leaves out" in record]
    assert "RecurrentGemmaForCausalLM" in warning and "second pass" in warning
    (batch,) = trainer.rollouts
    for row in range(len(batch["completion_ids"])):
        tokens, policy = own_distribution(model, batch, row, 0.7)
        expected = policy.gather(1, tokens.unsqueeze(1)).squeeze(1).log()
        torch.testing.assert_close(batch["old_per_token_logps"][row][: len(tokens)], expected, atol=1e-4, rtol=1e-4)
    entropy = trainer.state.log_history[0]["entropy"]
    assert entropy > 0


def test_a_head_that_trl_knows_is_scored_once(tokenizer, even_prompts, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rolled_out(PPOTrainer, PPOConfig, tokenizer, even_prompts, tmp_path, "granite")
    assert not any("fused LM head" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(NLPOTrainer, NLPOConfig), (QActorCriticTrainer, QActorCriticConfig)]
)
def test_logits_that_no_scoring_follows_are_refused(tokenizer, even_prompts, tmp_path, trainer_class, config_class):
    model = build(tokenizer, "granite")

    def double(module, args, output):
        if "logits" in output:
            output.logits = output.logits * 2

    model.register_forward_hook(double)
    with pytest.raises(ValueError, match="off by .* nats from those of its own logits: .* Remove what was put on"):
        trainer_class(model, count_good, config_class(**settings(tmp_path)), even_prompts, processing_class=tokenizer)


def test_dpo_scores_by_the_models_own_logits(tokenizer, rankings, tmp_path, caplog):
    model = build(tokenizer, "recurrent_gemma")
    args = RankingDPOConfig(
        **ranking_settings(tmp_path, max_steps=1, learning_rate=0.0, per_device_train_batch_size=1)
    )
    with caplog.at_level(logging.WARNING):
        trainer = RankingDPOTrainer(
            model, build(tokenizer, "recurrent_gemma"), args, train_dataset=rankings, processing_class=tokenizer
        )
    assert any("fused LM head leaves out" in message for message in caplog.messages)
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        actual, _ = trainer._values(model.eval(), inputs, packed=False)
        for index, item in zip(*(x.tolist() for x in (inputs["rows"].flatten(), actual.flatten())), strict=True):
            ids, mask = inputs["input_ids"][index], inputs["attention_mask"][index].bool()
            logps = model(input_ids=ids[mask][None]).logits[0, :-1].log_softmax(dim=-1)
            logps = logps.gather(1, ids[mask][1:, None]).squeeze(1)
            expected = logps[inputs["completion_mask"][index][mask][1:].bool()].sum().item()
            assert item == pytest.approx(expected, abs=1e-3)
