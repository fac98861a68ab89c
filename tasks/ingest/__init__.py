"""Images in: `shard` packs them, `embed` reads them with the frozen CLIP."""
