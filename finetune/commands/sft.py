"""`ft sft`: supervised fine-tuning of a recipe.

check recipe, output and data -> load the base -> put the adapter on -> train -> save and report. Nothing is written
before everything that can be checked has been checked.
"""

from __future__ import annotations

from finetune.adapters import compatibility
from finetune.adapters.load import apply, loads_trainable, prepare
from finetune.adapters.methods import check
from finetune.data import conversations
from finetune.data.chat import make_encoder
from finetune.families import family
from finetune.models import hardware, loading
from finetune.models.quantization import is_held_quantized
from finetune.models.rope import check_length
from finetune.recipe.stages import SftRecipe
from finetune.run.opening import open_run
from finetune.run.resuming import check_resumable
from finetune.training import session


def run(raw: SftRecipe, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    machine = hardware.detect()
    recipe = session.resolved(raw, machine)
    if resume:
        check_resumable(recipe)
    compatibility.check(recipe)
    config = loading.read_config(recipe.model)
    compatibility.check_base(recipe, config)
    if recipe.model.adapter is None:
        check(loading.skeleton(recipe.model), recipe.adapter, is_held_quantized(recipe.model, config))
    tokenizer = loading.load_tokenizer(recipe.model)
    encoder = make_encoder(tokenizer, family(config["model_type"]))
    data = conversations.load_sft(recipe.data, encoder, seed=recipe.train.seed, eval_data=recipe.eval.data)
    too_long = check_length(config, recipe.model, session.longest_row(data.train))
    plan = session.layout(recipe, len(data.train), len(data.train), machine)
    said = (too_long, session.few_rows(recipe, len(data.train)), session.other_devices(recipe))
    inputs = session.known_inputs(recipe, tokenizer, encoder.template, resume, dry_run)
    if dry_run:
        session.announce(data.warnings, plan.total_steps, *said, session.packing_outlook(recipe))
        session.show_plan(recipe, data.counts, plan)
        return

    session.start(recipe)
    base = loading.load_model(recipe.model, session.weights_dtype(recipe), machine)
    loading.refuse_training(base, recipe.model.name)
    if recipe.model.adapter is None:
        model = apply(base, recipe.adapter, tokenizer, loading.folder(recipe.model))
    else:
        start = loading.adapter_folder(recipe.model.adapter)
        model = loading.attach_adapter(base, start, recipe.model, trainable=loads_trainable(start))
        prepare(model)
    rows, packing_note = session.pack_if_isolated(recipe, model, tokenizer, data.train)
    plan = session.layout(recipe, len(data.train), len(rows), machine)
    notes = session.announce(data.warnings, plan.total_steps, packing_note, *said)

    with open_run(recipe, overwrite, resume) as folder:
        trainer = session.make_trainer(recipe, folder, model, tokenizer, rows, data.eval, plan, machine)
        outcome = session.fit(trainer, folder, resume, inputs)
        weights = session.save(recipe, folder, model, tokenizer, encoder.template)
        session.finish(recipe, folder, trainer, outcome, data.counts, notes)
        session.summary(recipe, folder, weights)
