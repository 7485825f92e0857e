"""`ft recipes import`: a training config or command line of LLaMA-Factory, axolotl, ms-swift or trl becomes a recipe.

source = read(path)          the tool, its stage word, and its keys with their values
found = translate(source)    a recipe's values that pass our own checks, and what has no equivalent, with the reason
"""
