"""The hyper-parameters of a method in the parameter groups of its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wsam_fused.arguments import choice, number
from wsam_fused.base_rules import device_learning_rate
from wsam_fused.plan import Geometry
from wsam_fused.schedules import Schedule, is_schedule, value_at

GEOMETRIES = {geometry.name.lower(): geometry for geometry in Geometry}
_DEFAULT_ETA = {"euclidean": 0.0, "adaptive": 0.01, "fisher": 1.0}

# Where a group counts its steps. No base optimizer has a key of that name.
STEP = "sam_step"
# Where it says of which method it is.
METHOD = "sam_method"


class MethodKeys:
    """Names and schedules of a method's hyper-parameters.

    Args:
        own: The hyper-parameters and their default values.
        scheduled: Which of them may be a schedule.
        taken: Keys of the base optimizer. A foreign one reads keys of its own; where one is called
            like ours, ours gets the prefix ``sam_``.
    """

    def __init__(
        self, own: Mapping[str, Any], scheduled: Sequence[str], taken: Mapping[str, Any]
    ) -> None:
        self._own = dict(own)
        self._scheduled = tuple(scheduled)
        self.names = {key: f"sam_{key}" if key in taken else key for key in own}
        self._schedules: list[dict[str, Schedule]] = []

    def defaults(self) -> dict[str, Any]:
        """Return the default values by group key."""
        return {STEP: 0, **{self.names[key]: value for key, value in self._own.items()}}

    def read(self, group: Mapping[str, Any], key: str) -> Any:
        """Read a hyper-parameter, whatever it is called in the group."""
        return group[self.names[key]]

    def values(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return all hyper-parameters of a group."""
        return {key: group[name] for key, name in self.names.items()}

    def spell_out(self, group: dict[str, Any]) -> None:
        """Replace what is written in short in a group that a user gives.

        ``adaptive`` is short for a geometry and an eta; a geometry alone has an eta of its own.
        """
        geometry, eta = self.names["geometry"], self.names["eta"]
        if "adaptive" in group:
            if group.pop("adaptive"):
                if group.setdefault(geometry, "adaptive") != "adaptive":
                    raise ValueError(_contradiction(group[geometry]))
                group.setdefault(eta, 0.0)
            else:
                group.setdefault(geometry, "euclidean")
        if geometry in group:
            group.setdefault(eta, _DEFAULT_ETA.get(group[geometry], 0.0))

    def take_schedules(self, group: dict[str, Any]) -> None:
        """Keep the schedules of a new group and put the numbers of its next step there."""
        found = {}
        for key in self._scheduled:
            if is_schedule(group[self.names[key]]):
                found[key] = group[self.names[key]]
        self._schedules.append(found)
        self._apply(group, found)

    def forget_last_group(self) -> None:
        """Forget the schedules of a group that was not added after all."""
        self._schedules.pop()

    def apply_schedules(self, groups: Sequence[dict[str, Any]]) -> None:
        """Bring the numbers of all groups to the step that is about to be made."""
        for group, schedules in zip(groups, self._schedules, strict=True):
            self._apply(group, schedules)

    def _apply(self, group: dict[str, Any], schedules: Mapping[str, Schedule]) -> None:
        for key, schedule in schedules.items():
            if device_learning_rate(group) is not None and not callable(schedule):
                raise TypeError(
                    f"{key} is proportional to lr, which is a tensor on {group['lr'].device}; "
                    "expected lr to be a number or a tensor on the CPU"
                )
            value = value_at(schedule, group[STEP] + 1, group.get("lr"))
            group[self.names[key]] = number(f"{key} at step {group[STEP] + 1}", value, 0.0)


def geometry_of(geometry: str | None, eta: float | None, *, adaptive: bool) -> dict[str, Any]:
    """Return ``geometry`` and ``eta`` from the arguments of a method's constructor.

    Raises:
        ValueError: They contradict each other or are out of range.
    """
    if adaptive and geometry not in (None, "adaptive"):
        raise ValueError(_contradiction(geometry))
    name = geometry or ("adaptive" if adaptive else "euclidean")
    choice("geometry", name, tuple(GEOMETRIES))
    default = 0.0 if adaptive and geometry is None else _DEFAULT_ETA[name]
    return {"geometry": name, "eta": default if eta is None else number("eta", eta, 0.0)}


def _contradiction(geometry: Any) -> str:
    return f"adaptive is True, short for geometry='adaptive', but geometry is {geometry!r}"


def without_weight(group: Mapping[str, Any]) -> frozenset[int]:
    """Return the positions of parameters whose name does not contain "weight".

    Raises:
        ValueError: The parameters have no names.
    """
    names = group.get("param_names")
    if names is None:
        raise ValueError(
            "only_weights is True, which needs the parameters' names; expected params to be "
            "model.named_parameters()"
        )
    return frozenset(i for i, name in enumerate(names) if "weight" not in name)
