"""A student's first weights taken from its teacher: the best vectors of its size for what the teacher knows."""

from __future__ import annotations

import torch

from apps.recsys.data.histories import Histories
from apps.recsys.models.base import DotRecommender, Recommender
from apps.recsys.models.factors import MatrixFactorization
from apps.recsys.models.linear import fit_svd
from apps.recsys.models.sasrec import Sasrec
from kdcore.config import UserError


def initialize_from(student: DotRecommender, teacher: Recommender, train: Histories, seed: int) -> None:
    """Set a matrix factorisation to the truncated SVD of the teacher's scores, a SASRec's items to the teacher's.

    For a SASRec the teacher's item vectors are projected on their first principal directions, which keeps their inner
    products as well as its dimension can (Eckart and Young, 1936); its attention layers stay random.
    """
    with torch.no_grad():
        if isinstance(student, MatrixFactorization):
            factors = fit_svd(teacher, train, student.options.dimension, seed)
            student.user.copy_(factors.user)
            student.item.copy_(factors.item)
        elif isinstance(student, Sasrec):
            _project_items(student, teacher)
        else:
            raise UserError(f"student.initialize svd: wanted a student of kind mf or sasrec, got {student.kind}")


def _project_items(student: Sasrec, teacher: Recommender) -> None:
    dimension = student.options.dimension
    if not isinstance(teacher, DotRecommender) or teacher.item_vectors().shape[1] < dimension:
        raise UserError(
            f"student.initialize svd: wanted a teacher with item vectors of at least {dimension} dimensions, "
            f"got {teacher.label()}"
        )
    items = teacher.item_vectors().detach()
    _, _, directions = torch.linalg.svd(items.T @ items)
    student.item[: student.n_items].copy_(items @ directions[:dimension].T)
