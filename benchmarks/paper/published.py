"""What the papers found: their numbers, for the tables and findings beside ours.

WSAM paper: Yue et al., KDD 2023, arXiv:2305.15817. All are mean and standard deviation over five
seeds, in per cent, as printed.
"""

from __future__ import annotations

Number = tuple[float, float]

# Table 2: top-1 error; by model, data set and method.
ERROR: dict[tuple[str, str], dict[str, Number]] = {
    ("resnet18", "cifar10"): {
        "SGDM": (4.32, 0.07),
        "SAM": (3.68, 0.06),
        "ESAM": (3.83, 0.08),
        "GSAM": (3.71, 0.11),
        "WSAM": (3.62, 0.10),
    },
    ("resnet18", "cifar100"): {
        "SGDM": (20.51, 0.20),
        "SAM": (19.97, 0.30),
        "ESAM": (20.67, 0.24),
        "GSAM": (19.84, 0.27),
        "WSAM": (19.42, 0.12),
    },
    ("wrn28-10", "cifar10"): {
        "SGDM": (3.73, 0.09),
        "SAM": (2.94, 0.08),
        "ESAM": (2.99, 0.07),
        "GSAM": (2.91, 0.08),
        "WSAM": (2.74, 0.07),
    },
    ("wrn28-10", "cifar100"): {
        "SGDM": (19.27, 0.12),
        "SAM": (16.49, 0.09),
        "ESAM": (16.52, 0.21),
        "GSAM": (16.36, 0.32),
        "WSAM": (16.33, 0.26),
    },
}
# Table 8: the same; SAM and WSAM as above.
COUPLED: dict[tuple[str, str], Number] = {
    ("resnet18", "cifar10"): (3.58, 0.12),
    ("resnet18", "cifar100"): (19.49, 0.13),
    ("wrn28-10", "cifar10"): (2.91, 0.06),
    ("wrn28-10", "cifar100"): (16.49, 0.09),
}
# Table 6: top-1 accuracy of ResNet18 on CIFAR-10; by share of noisy labels and method.
NOISY_ACCURACY: dict[float, dict[str, Number]] = {
    0.2: {
        "SGDM": (88.06, 0.48),
        "SAM": (94.99, 0.09),
        "ESAM": (94.93, 0.18),
        "GSAM": (95.11, 0.11),
        "WSAM": (95.18, 0.12),
    },
    0.4: {
        "SGDM": (84.11, 0.39),
        "SAM": (93.28, 0.16),
        "ESAM": (92.69, 0.48),
        "GSAM": (93.25, 0.12),
        "WSAM": (93.33, 0.11),
    },
    0.6: {
        "SGDM": (79.15, 0.43),
        "SAM": (88.32, 0.28),
        "ESAM": (86.42, 0.30),
        "GSAM": (89.90, 0.18),
        "WSAM": (89.95, 0.12),
    },
    0.8: {
        "SGDM": (69.07, 0.95),
        "SAM": (77.57, 0.51),
        "ESAM": (32.29, 4.67),
        "GSAM": (79.09, 0.91),
        "WSAM": (78.30, 0.92),
    },
}
# Table 7: top-1 error of WRN-28-10 on CIFAR-10; by geometry and method.
GEOMETRY_ERROR: dict[str, dict[str, Number]] = {
    "euclidean": {"SAM": (2.94, 0.08), "WSAM": (2.74, 0.07)},
    "adaptive": {"SAM": (2.84, 0.04), "WSAM": (2.90, 0.08)},
    "fisher": {"SAM": (3.00, 0.13), "WSAM": (3.45, 0.35)},
}
# Table 9: training loss, test accuracy (%) and largest Hessian eigenvalue; ResNet18, CIFAR-10.
MINIMA: dict[str, tuple[float, float, float]] = {
    "SGDM": (0.0026, 95.75, 62.58),
    "SAM": (0.0339, 96.22, 22.67),
    "WSAM": (0.0089, 96.54, 23.97),
}
# Table 4: top-1 error of DeiT-Base after three more epochs on ImageNet; 18.2 before.
FINETUNED_ERROR: dict[str, Number] = {
    "SGDM": (18.17, 0.005),
    "SAM": (18.01, 0.007),
    "GSAM": (18.01, 0.005),
    "WSAM": (18.01, 0.003),
}


def printed(number: Number) -> str:
    """Return a number as the paper prints it."""
    return f"{number[0]:g} ± {number[1]:g}"
