"""torchvision beside a CPU build of PyTorch, whose operators its wheel misses."""


def import_torchvision():
    """Import torchvision, declaring the operators that torch's CPU build lacks; none is used."""
    import torch

    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define(
            "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
            "int pooled_width, int sampling_ratio, bool aligned) -> Tensor"
        )
        import torchvision

        torchvision.stub_operators = library  # Kept alive: they vanish with it.
    return torchvision
