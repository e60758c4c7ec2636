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
processor = AutoProcessor.from_pretrained(model_path)
base = AutoModelForImageTextToText.from_pretrained(model_path).to(accelerator.device)
adapted = corda_vlm.prepare(base, Dataset.from_json(kept_path), mode="kpm", rank=8, processor=processor)
loader = torch.utils.data.DataLoader(
    Dataset.from_json(training_path).shuffle(seed=0), 16 // accelerator.num_processes, collate_fn=Collator(processor, with_labels=True)
)
optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3, weight_decay=0.0)
model, optimizer, loader = accelerator.prepare(adapted.train(), optimizer, loader)
for batch in (batch for _ in range(20) for batch in loader):
    count = accelerator.reduce((batch["labels"] != -100).sum())  # of all processes: a mean over their tokens, not of their means
    loss = model(**batch, num_items_in_batch=count / accelerator.num_processes).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print({"loss": accelerator.reduce(loss.detach(), "mean").item()})
if accelerator.is_main_process:
    corda_vlm.export(adapted, output)
