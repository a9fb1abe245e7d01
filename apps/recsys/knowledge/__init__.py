"""What a teacher passes on: one class a way of teaching, each made of kdcore losses."""

from __future__ import annotations

from apps.recsys.knowledge.base import Knowledge, Lessons, Score, TeacherLists
from apps.recsys.knowledge.experts import DistillationExperts, ItemDistillationExperts
from apps.recsys.knowledge.ranks import CollaborativeDistillation, RankingDistillation
from apps.recsys.knowledge.relaxed import ItemRelaxedRanking, RelaxedRanking
from apps.recsys.knowledge.targets import SoftTargets, SparseSoftTargets

__all__ = ["KNOWLEDGE", "Knowledge", "Lessons", "Score", "TeacherLists"]

KNOWLEDGE: dict[str, type[Knowledge]] = {
    cls.name: cls
    for cls in (
        RankingDistillation,
        CollaborativeDistillation,
        RelaxedRanking,
        ItemRelaxedRanking,
        SoftTargets,
        SparseSoftTargets,
        DistillationExperts,
        ItemDistillationExperts,
    )
}
