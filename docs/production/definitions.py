"""The Feast objects of a production repository: the library's, read by Spark, and the services of your consumers."""

from pathlib import Path

from kellm_features.store.views import consumer_service, knowledge_objects

# The registry holds this folder's absolute path: mount it under the same one wherever history is joined.
DATA = Path(__file__).parent / "data"

objects = knowledge_objects(DATA, id_type="int64", source="spark")
globals().update(objects)

# One service per consumer. `version="v2026…"` pins it to the embeddings that its model was trained on: the online
# store then refuses to answer it from any other. Without, it takes what is served.
shop_ranker = consumer_service(
    "shop_ranker",
    [
        objects["item_knowledge_embedding"][["embedding", "embedding_version"]],
        objects["item_user_affinity"],
        objects["item_embedding_age"],
    ],
    description="Ranking on the shop's front page; fetch with full_feature_names=True.",
    owner="ranking@example.org",
)
