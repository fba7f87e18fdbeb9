"""The Feast objects of this repository: entities, views and services, all made by kellm_features.

`feast apply` takes the Feast objects that it finds under this module's names. Add your own below.
"""

from pathlib import Path

from kellm_features.store.views import knowledge_objects

globals().update(knowledge_objects(Path(__file__).parent / "data", id_type="int64"))
