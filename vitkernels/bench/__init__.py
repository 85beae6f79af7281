"""Timing the operation and whole models beside their baselines."""
