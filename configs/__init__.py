"""The configs by name: ``default`` lists every field; each other one edits a few of them."""
