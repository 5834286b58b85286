import { createHash } from 'node:crypto'
import { relative, resolve } from 'node:path'
import { quote, RopewalkError } from '../errors.js'
import type { JsonValue } from '../files/json.js'
import type { Llama } from '../model/llama.js'
import { isTrained, type LoraSettings } from '../model/lora.js'
import { writeRope } from '../rope.js'
import { isQuantized, Tensor } from '../runtime/tensor.js'
import { findCheckpoint, listCheckpoints, removeLeftovers, type TrainerRecord } from './checkpoint.js'
import { MEMORY_DEFAULTS, type MemorySettings } from './memory.js'
import type { Settings } from './options.js'

/** Bytes of each weight that tell it from another one. */
const SAMPLE = 4096

/**
 * The checkpoint that the options ask to go on from, undefined for a start from the beginning. Throws RopewalkError
 * ERR_EXISTS where the run would mix its checkpoints with others, ERR_NOT_FOUND, ERR_CHECKPOINT.
 */
export async function checkpointToResume(
  { output, resume }: Settings,
  warn: (message: string) => void,
): Promise<{ path: string; record: TrainerRecord } | undefined> {
  if (output !== undefined) await removeLeftovers(output)
  const [newest] = output === undefined ? [] : await listCheckpoints(output)
  const inside = typeof resume === 'string' && !relative(resolve(output ?? ''), resolve(resume)).startsWith('..')
  if (newest && resume !== true && !inside) {
    throw new RopewalkError(
      'ERR_EXISTS',
      `${output}: there are checkpoints of an earlier run (the newest is ${newest.path}): ` +
        'set resume: true to go on from there, or choose another output',
    )
  }
  if (resume === false) return undefined
  const found = await findCheckpoint(resume === true ? output! : resume, warn)
  if (!found && typeof resume === 'string') {
    throw new RopewalkError('ERR_NOT_FOUND', `${resume}: there is no checkpoint to resume`)
  }
  // Of two lines of checkpoints in one folder, the one with the higher numbers would outlive the other.
  if (found && newest && typeof resume === 'string' && newest.step > found.record.step) {
    throw new RopewalkError(
      'ERR_EXISTS',
      `${found.path}: there are later checkpoints in ${output} (the newest is ${newest.path}): ` +
        'move those away, set resume: true to go on from the newest, or choose another output',
    )
  }
  return found
}

/** The options that decide what a run computes, as they stand in trainer.json. */
export function decisiveOptions(settings: Settings): TrainerRecord['options'] {
  const { batchSize, accumulate, learningRate, eps, weightDecay, maxGradNorm, warmupSteps, schedule, seed, packing } =
    settings
  // A constant rate does not depend on how long the run is to be: it may be made longer.
  const falls = schedule !== 'constant'
  return {
    context: settings.context ?? null,
    batchSize,
    accumulate,
    learningRate,
    betas: [...settings.betas],
    eps,
    weightDecay,
    maxGradNorm,
    warmupSteps,
    schedule,
    ...(falls && { steps: settings.steps, finalFraction: settings.finalFraction }),
    seed,
    packing,
    ...(settings.lora && { lora: { ...settings.lora, targets: [...settings.lora.targets] } as unknown as JsonValue }),
    ...(settings.pose && { pose: { ...settings.pose } }),
    // Where they are as they have always been, records of earlier releases say nothing of them.
    ...decisiveMemory(settings),
  }
}

/** Where and for how long something is kept does not matter; how it is rounded does. */
const DECISIVE_MEMORY = ['gradients', 'masters', 'moments', 'mlpRows', 'logitsRows'] as const

/** Those of a checkpoint's options that a resumed run has to keep to. */
export function savedMemory({ options }: TrainerRecord): Partial<MemorySettings> {
  const saved = DECISIVE_MEMORY.map((name) => [name, options[`memory.${name}`] ?? MEMORY_DEFAULTS[name]])
  return Object.fromEntries(saved) as Partial<MemorySettings>
}

function decisiveMemory({ memory }: Settings): TrainerRecord['options'] {
  return Object.fromEntries(
    DECISIVE_MEMORY.flatMap((name) =>
      memory[name] === MEMORY_DEFAULTS[name] ? [] : [[`memory.${name}`, memory[name]]],
    ),
  )
}

/**
 * A hash of the beginnings of all weights that training an adapter leaves as they are: its checkpoints do not have them,
 * and are of use with these alone. Training changes every matrix all over.
 */
export async function frozenWeights({ device, weights }: Llama, { alsoTrain }: LoraSettings): Promise<string> {
  const hash = createHash('sha256')
  for (const { name, value } of weights) {
    if (isTrained(name, value.dims, alsoTrain)) continue
    const { storage, offset, bytes, dtype } = value
    const size = Math.min(bytes, SAMPLE)
    // Scales of quantised ones are at their end.
    for (const at of isQuantized(dtype) ? [offset, offset + bytes - size] : [offset]) {
      hash.update(await device.download(new Tensor(storage, at, 'u8', [size])))
    }
  }
  return hash.digest('hex')
}

/** What decides the model beside its weights, as it stands in trainer.json; `frozen` are those that are not saved. */
export function decisiveModel(
  { config, dtype, quantization, lora }: Llama,
  settings: Settings,
  frozen?: string,
): TrainerRecord['model'] {
  const { raw: _, bosId: _bos, eosIds: _eos, originalMaxPositionEmbeddings: original, ...fields } = config
  // As config.json says it: a config that was read, stretched or not, and one that was saved are then the same.
  const rope = writeRope(config.rope, original)
  const adapter = settings.lora && {
    frozenWeights: frozen,
    adapterScale: lora?.scale ?? settings.lora.alpha / settings.lora.rank,
  }
  return JSON.parse(JSON.stringify({ ...fields, rope, dtype, quantization, ...adapter })) as TrainerRecord['model']
}

/** Throws RopewalkError ERR_RESUME that names the first difference, what was saved and what is given now. */
export function requireSame(
  path: string,
  saved: TrainerRecord,
  settings: Settings,
  model: Llama,
  frozen: string | undefined,
): void {
  const compare = (what: string, then: Record<string, JsonValue>, now: Record<string, JsonValue>): void => {
    for (const name of new Set([...Object.keys(then), ...Object.keys(now)])) {
      if (canonical(then[name]) === canonical(now[name])) continue
      throw new RopewalkError(
        'ERR_RESUME',
        `${path}: ${what} ${name} was ${quote(then[name])} when this checkpoint was written, but is ${quote(now[name])} now: ` +
          'a resumed run goes on as it began. Use the saved value, or start anew from the checkpoint with Llama.load',
      )
    }
  }
  compare('option', saved.options, decisiveOptions(settings))
  compare("the model's", saved.model, decisiveModel(model, settings, frozen))
}

/** JSON with sorted keys: objects from a file and from a config need not have the same order. */
function canonical(value: JsonValue | undefined): string {
  return (
    JSON.stringify(value, (_, item: JsonValue) =>
      typeof item === 'object' && item !== null && !Array.isArray(item)
        ? Object.fromEntries(Object.entries(item).sort(([a], [b]) => (a < b ? -1 : 1)))
        : item,
    ) ?? 'undefined'
  )
}
