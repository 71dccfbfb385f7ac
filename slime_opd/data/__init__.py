"""Prompts: file formats, columns, chat templates, and a source with a cursor that can be saved."""
