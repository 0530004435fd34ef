"""Fine-tuning torchvision's Mask R-CNN on a COCO dataset, as torchvision's own references do it.

`settings.py` says what may be chosen, `dataset.py` turns annotations into samples, `augmentation.py` varies them,
`network.py` builds the network and saves it, `trainer.py` takes the steps, `job.py` is the whole job on one page.
"""
