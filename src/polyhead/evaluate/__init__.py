"""Evaluation: tasks with known answers, metrics a query, and statistics for every comparison."""
