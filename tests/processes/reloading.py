"""Loads what the trainers saved, as a user would in a new process: `reloading.py CASES.json OUTPUT.pt`."""

import json
import sys

import torch
from helpers import outputs_of, quantization_config
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trl_ext import load_critic


if __name__ == "__main__":
    results = {}
    for name, (what, method, folder) in json.load(open(sys.argv[1])).items():
        is_reward_model, is_adapter = what == "reward", method != "full"
        if is_adapter:
            auto_class = AutoPeftModelForSequenceClassification if is_reward_model else AutoPeftModelForCausalLM
        else:
            auto_class = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
        kwargs = {"num_labels": 1} if is_reward_model else {}
        model = auto_class.from_pretrained(folder, quantization_config=quantization_config(method), **kwargs)
        has_critic = what in ("shared", "adapter", "separate")
        results[name] = outputs_of(model, load_critic(model, folder) if has_critic else None)
        if is_adapter:  # transformers alone finds the base by itself
            plain = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
            model = plain.from_pretrained(folder, quantization_config=quantization_config(method), **kwargs)
            results[name]["plain"] = outputs_of(model)["logits"]
    torch.save(results, sys.argv[2])
