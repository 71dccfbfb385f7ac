"""Prompts: files, columns, chat templates, and a source with a cursor."""
