"""Collections of images: what lists their items and reads their bytes."""
