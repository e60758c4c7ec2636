"""Fine-tune a vision-language model in your own loop, on JSON lines with `image` (a path), `question` and `answer`.

accelerate launch -m corda_vlm.examples.accelerate_loop my-llava kept.jsonl training.jsonl my-adapter
"""

import sys

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

import corda_vlm
from corda_vlm.data.samples import Collator

model_path, kept_path, training_path, output = sys.argv[1:]
accelerator = Accelerator()  # before `prepare`, which then shares its work out among the processes
processor, base = AutoProcessor.from_pretrained(model_path), AutoModelForImageTextToText.from_pretrained(model_path)
kept, training = Dataset.from_json(kept_path), Dataset.from_json(training_path).shuffle(seed=0)
adapted = corda_vlm.prepare(base.to(accelerator.device), kept, mode="kpm", rank=8, processor=processor)
loader = torch.utils.data.DataLoader(training, 16 // accelerator.num_processes, collate_fn=Collator(processor, with_labels=True))
optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3, weight_decay=0.0)
model, optimizer, loader = accelerator.prepare(adapted.train(), optimizer, loader)
keeper = corda_vlm.Keeper(adapted, kept, Collator(processor), corda_vlm.KeepOptions(every=4), batch_size=4, num_steps=20 * len(loader))
for step, batch in enumerate(batch for _ in range(20) for batch in loader):
    for loss in keeper.losses(step):  # of every fourth step; before the model's own pass, whose gradients DDP then adds to these
        accelerator.backward(loss)
    count = accelerator.reduce((batch["labels"] != -100).sum())  # of all processes: a mean over their tokens, not of their means
    loss = model(**batch, num_items_in_batch=count / accelerator.num_processes).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print({"loss": accelerator.reduce(loss.detach(), "mean").item()})
corda_vlm.export(adapted, output)  # the first process writes
