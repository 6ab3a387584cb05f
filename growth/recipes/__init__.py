"""Recipes: chains of verbs as YAML, validated before they run, recorded, and repeated."""
