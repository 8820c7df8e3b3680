"""Inputs that a model of an unknown family may take: each is tried until its forward runs."""

import inspect

import torch

from .tiny_configs import NUM_TEXT_TOKENS, VOCABULARY, configs_in


BATCH = 2
TEXT_LENGTH = 12
NUM_PATCHES = 4
NUM_SAMPLES = 16000
FRAMES = (128, 3000, 512, 1024)


def candidates(model):
    """Keyword arguments for the model's forward, the ones that reach most of the model first.

    Yields:
        What they hold, in words, and a dict.
    """
    inputs = _Inputs(model)
    for what, parts in (
        ("text and images", inputs.images_in_text),
        ("text and audio", inputs.audio_in_text),
        ("text and images", inputs.images_beside_text),
        ("images", inputs.images),
        ("text and audio", inputs.audio_beside_text),
        ("audio", inputs.audio),
        ("text", inputs.text_alone),
        ("numbers", inputs.numbers),
    ):
        for values in parts():
            yield what, inputs.completed(values)


class _Inputs:
    def __init__(self, model):
        self.model, self.config = model, model.config
        self.parameters = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(1)

    # Parts

    def images_in_text(self):
        yield from self._in_text("image", self._pictures)

    def audio_in_text(self):
        yield from self._in_text("audio", self._recordings)

    def _in_text(self, kind, parts):
        """Images or audio whose features stand at placeholders among the tokens."""
        token = self._setting(f"{kind}_token_id", f"{kind}_token_index")
        features_of = getattr(self.model, f"get_{kind}_features", None)
        if token is None or "input_ids" not in self.parameters or features_of is None:
            return
        for values in parts():
            yield from self._with_placeholders(values, features_of, token)

    def images_beside_text(self):
        if "input_ids" in self.parameters and "pixel_values" in self.parameters:
            for values in self._pictures():
                yield {**values, "input_ids": self._tokens()}

    def images(self):
        yield from self._pictures()

    def audio_beside_text(self):
        if "input_ids" in self.parameters:
            for values in self._recordings():
                yield {**values, "input_ids": self._tokens()}

    def audio(self):
        yield from self._recordings()

    def text_alone(self):
        if "input_ids" in self.parameters:
            yield {"input_ids": self._tokens()}
            yield {"input_ids": self._tokens(length=64)}
            books = self._setting("num_codebooks", "num_code_groups", "n_q")
            if books:
                yield {"input_ids": torch.stack([self._tokens()] * books, -1)}

    def numbers(self):
        """Time series, and hidden states that come from another model."""
        width = self._setting("hidden_size", "d_model")
        length = self._setting("context_length", "prediction_length") or TEXT_LENGTH
        for name in ("past_values", "inputs_embeds", "hidden_states", "inputs", "input_values", "x"):
            if name in self.parameters:
                for shape in ((BATCH, length, self._setting("num_input_channels") or 1), (BATCH, length),
                              (BATCH, TEXT_LENGTH, width or 1)):  # fmt: skip
                    yield {name: self._noise(*shape)}

    # Completion

    def completed(self, values):
        """With what else the forward asks for: masks, the decoder's tokens, boxes."""
        values = dict(values)
        ids = values.get("input_ids")
        decoder = self._setting("decoder_start_token_id")
        if "decoder_input_ids" in self.parameters:
            start = torch.full((BATCH, 1), decoder if decoder is not None and 0 <= decoder < VOCABULARY else 0)
            values["decoder_input_ids"] = torch.cat([start, self._tokens(length=6)], 1)
        if ids is not None and "bbox" in self.parameters:
            values["bbox"] = torch.tensor([1, 2, 5, 9]).expand(*ids.shape, 4)
        for name in ("attention_mask", "feature_attention_mask", "input_features_mask", "padding_mask"):
            if self._is_required(name):
                features = next((v for k, v in values.items() if k.startswith("input_")), None)
                if features is not None:
                    values[name] = torch.ones(features.shape[:2], dtype=torch.long)
        if "use_cache" in self.parameters:
            values["use_cache"] = False
        return {name: value for name, value in values.items() if name in self.parameters or self._takes_anything()}

    # Pieces

    def _tokens(self, length=TEXT_LENGTH):
        highest = min(NUM_TEXT_TOKENS, self._setting("vocab_size") or NUM_TEXT_TOKENS)
        return torch.randint(3, highest, (BATCH, length), generator=self.generator)

    def _noise(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def _pictures(self):
        """Images as the families want them: whole, cut into patches with a grid, several a sample, videos."""
        side = self._setting("image_size", "img_size", "input_image_size") or 64
        height, width = side if isinstance(side, list | tuple) else (side, side)
        patch = self._setting("patch_size", "spatial_patch_size") or 16
        channels = self._setting("num_channels", "in_channels", "in_chans") or 3
        if not isinstance(patch, int) or not isinstance(channels, int):
            patch, channels = 16, 3
        frames = self._setting("temporal_patch_size") or 1
        grid = torch.tensor([[1, NUM_PATCHES, NUM_PATCHES]] * BATCH)
        rows = BATCH * NUM_PATCHES**2
        if "image_grid_thw" in self.parameters:
            yield {"pixel_values": self._noise(rows, channels * frames * patch**2), "image_grid_thw": grid}
        if "grid_thw" in self.parameters:
            yield {"hidden_states": self._noise(rows, channels * frames * patch**2), "grid_thw": grid}
        sizes = {"image_sizes": torch.tensor([[height, width]] * BATCH)} if "image_sizes" in self.parameters else None
        name = next((n for n in ("pixel_values", "pixel_values_videos", "images") if n in self.parameters), None)
        if name is None:
            return
        image = self._noise(BATCH, channels, height, width)
        if "spatial_shapes" in self.parameters:
            patches = self._noise(BATCH, NUM_PATCHES**2, channels * patch**2)
            shapes = torch.tensor([[NUM_PATCHES, NUM_PATCHES]] * BATCH)
            mask = torch.ones(BATCH, NUM_PATCHES**2, dtype=torch.long)
            yield {name: patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}
        yield {name: image}
        if sizes:
            yield {name: image, **sizes}
            yield {name: image[:, None].expand(-1, 3, -1, -1, -1), **sizes}
        yield {name: image[:, None]}
        num_frames = self._setting("num_frames", "frames_per_clip") or 2
        yield {name: image[:, None].expand(-1, num_frames, -1, -1, -1)}
        yield {name: self._noise(BATCH, channels, 224, 224)}
        yield {name: self._noise(rows, channels, patch, patch), "image_grid_hws": grid[:, 1:]}

    def _recordings(self):
        """Spectrograms of both layouts and of several lengths, or waveforms."""
        bins = self._setting("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "mel_bins") or 80
        bins = bins if isinstance(bins, int) else 80
        for name in ("input_features", "audio_features"):
            if name in self.parameters:
                positions = self._setting("max_source_positions")
                for frames in ([2 * positions] if isinstance(positions, int) else []) + list(FRAMES):
                    for shape in ((bins, frames), (frames, bins)):
                        mask = torch.ones(BATCH, frames, dtype=torch.long)
                        masks = {n: mask for n in ("feature_attention_mask", "input_features_mask", "attention_mask")
                                 if n in self.parameters and not (n == "attention_mask" and "input_ids" in
                                                                  self.parameters)}  # fmt: skip
                        yield {name: self._noise(BATCH, *shape), **masks}
                        if masks:
                            yield {name: self._noise(BATCH, *shape)}
        for name in ("input_values", "audio_values"):
            if name in self.parameters:
                yield {name: self._noise(BATCH, NUM_SAMPLES)}
                yield {name: self._noise(BATCH, 1, NUM_SAMPLES)}
                length = self._setting("max_length")
                if isinstance(length, int):
                    yield {name: self._noise(BATCH, length, bins)}

    def _with_placeholders(self, values, features_of, token):
        accepted = inspect.signature(features_of).parameters
        try:
            with torch.no_grad():
                features = features_of(**{name: value for name, value in values.items() if name in accepted})
        except Exception:  # other pictures may do
            return
        total = _num_rows(features)
        if total is None or total % BATCH:
            return
        ids = self._tokens()
        half = TEXT_LENGTH // 2
        placeholders = torch.full((BATCH, total // BATCH), token)
        ids = torch.cat([ids[:, :half], placeholders, ids[:, half:]], 1)
        kinds = {name: (ids == token).long() for name in ("mm_token_type_ids", "token_type_ids")
                 if name in self.parameters}  # fmt: skip
        yield {**values, "input_ids": ids, **kinds}

    # What the model says of itself

    def _setting(self, *names):
        """The first value of one of these names, in the configuration or in those inside it."""
        for name in names:
            for config in configs_in(self.config):
                value = getattr(config, name, None)
                if value is not None and value is not False:
                    return value
        return None

    def _is_required(self, name):
        return name in self.parameters and self.parameters[name].default is inspect.Parameter.empty

    def _takes_anything(self):
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self.parameters.values())


def _num_rows(features):
    """How many vectors stand in what a model gives as its features of images or audio, or None."""
    pooled = getattr(features, "pooler_output", None)
    features = pooled if pooled is not None else features
    if torch.is_tensor(features):
        return features.shape[:-1].numel()
    if isinstance(features, list | tuple) and features and all(torch.is_tensor(f) for f in features):
        return sum(f.shape[:-1].numel() for f in features)
    return None
