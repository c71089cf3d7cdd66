"""Reinforcement learning from rewards: what answers are worth, and how a policy learns from it."""
