"""Your own images: a folder DIR/train/<class>/*.png (and DIR/test/<class>/...), or an .npz file.

    python run.py --config=configs/folder.py:clustr_qtrades --config.data.dir=PATH

The .npz holds x_train, y_train, x_test, y_test: uint8 [N, H, W, C] or [N, H, W], labels 0..Y-1. Without a
test folder a fifth of each class is held out for it; DIR/val (x_val, y_val) is held out in place of val_size.
Mean and std are those of the training images, the network is cnn up to 16 x 16 and ResNet-18 above
(`METHOD,cpu`: resnet8), eval.n at most all test images; config.json has what was chosen.
The rest is the paper's recipe for 32 x 32 images; set augment, eps and epochs to what suits yours, and make
large images smaller first: ResNet-18 here keeps the full size in its first stage.
"""

from configs import common


def get_config(method="clustr_qtrades"):
    c = common.base("folder")
    c.data.augment = "none"  # or "crop_flip", "crop", "flip"
    c.data.val_size = 0.05
    c.model.name = "auto"
    c.model.mean, c.model.std = (), ()  # those of the training images
    c.warmup.target = 0.90  # on the held-out part
    return common.configure(c, method)
