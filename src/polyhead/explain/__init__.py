"""Explanations of single answers: how much each token of one text mattered, how faithful that is, and it in words."""
