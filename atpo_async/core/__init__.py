"""Vocabulary and pure rules that every other package builds on."""
