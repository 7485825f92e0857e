"""What is wrong with a command, found before torch is imported: a second instead of twenty.

A module for each group of commands; `inputs` is what they share. What needs weights or a tokenizer is checked by the
commands.
"""
