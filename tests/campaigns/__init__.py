"""Campaigns: many bad inputs drawn at random, and the rule that says of each whether the project took it well.

python -m tests.campaigns merged --times 400 [--seed 1]
"""
