"""Backbones: one family a file, submodules named as torchvision names them."""
