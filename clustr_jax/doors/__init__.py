"""Doors to other tools, one file each; the tools themselves are imported only by who opens a door.

pytorch             to_torch, from_torch: a Classifier as a torch.nn.Module, and back; a file for AutoAttack
clustr_torch        its PyTorch side, a file without imports of this package: it is copied beside a model
foolbox_model       to_foolbox: a Classifier for Foolbox's attacks
safetensors_file    save, load: a Classifier in one file
"""
