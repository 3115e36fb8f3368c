"""The rankers there are, by kind."""

from __future__ import annotations

from rgalign_ray.ranker.base import Ranker
from rgalign_ray.ranker.baselines.bst import BST
from rgalign_ray.ranker.baselines.cosine import Cosine
from rgalign_ray.ranker.baselines.dcn_v2 import DCNv2
from rgalign_ray.ranker.baselines.deepfm import DeepFM
from rgalign_ray.ranker.baselines.din import DIN, DINSentence, DINText
from rgalign_ray.ranker.baselines.logistic_regression import LogisticRegression
from rgalign_ray.ranker.baselines.popularity import Popularity
from rgalign_ray.ranker.baselines.sasrec import SASRec
from rgalign_ray.ranker.baselines.two_tower import TwoTower
from rgalign_ray.ranker.qe_rec import QERec

MODELS: dict[str, type[Ranker]] = {
    model.kind: model
    for model in (
        QERec,
        TwoTower,
        SASRec,
        DIN,
        DINText,
        DINSentence,
        BST,
        DeepFM,
        DCNv2,
        LogisticRegression,
        Popularity,
        Cosine,
    )
}
