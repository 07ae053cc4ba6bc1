__version__ = "0.1.0"

from fmri_book.compat import watch_for_torchvision

watch_for_torchvision()
