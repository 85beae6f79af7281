"""The demonstration: photographs through a model before and after `fuse`, and a picture of it."""
