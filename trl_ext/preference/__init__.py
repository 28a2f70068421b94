"""Reward models and DPO from rankings with ties."""
