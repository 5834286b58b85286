// Adapters in PEFT's format: what stands in adapter_config.json, and under which names tensors are in the file.
import { open } from 'node:fs/promises'
import { quote, RopewalkError } from '../errors.js'
import { type AdapterFolder, adapterConfigName, adapterWeightsName } from '../files/adapter.js'
import type { AdapterSaveOptions } from '../files/save.js'
import type { TensorEntry } from '../files/safetensors.js'
import { writeRope } from '../rope.js'
import type { FileDType } from '../runtime/device.js'
import type { Tensor } from '../runtime/tensor.js'
import { type LlamaConfig, parameterShapes, readConfig, writeConfig } from './config.js'
import { adapterName, Lora, loraParts, type LoraSettings, type LoraTarget, loraTargets } from './lora.js'
import type { Parameters } from './parameters.js'

/** Before every tensor's name. */
const PREFIX = 'base_model.model.'

/** Fields of adapter_config.json that are read here, or that do not change what the adapter computes. */
const UNDERSTOOD = new Set([
  ...['peft_type', 'r', 'lora_alpha', 'use_rslora', 'init_lora_weights', 'target_modules', 'modules_to_save'],
  ...['peft_version', 'task_type', 'auto_mapping', 'base_model_name_or_path', 'revision', 'inference_mode'],
  ...['lora_dropout', 'exclude_modules', 'layers_pattern', 'megatron_core', 'qalora_group_size', 'runtime_config'],
  'ensure_weight_tying',
])
/** Ways to begin that leave the base as it is. */
const PLAIN_STARTS: unknown[] = [undefined, true, false, 'gaussian', 'orthogonal', 'eva']

const isOff = (value: unknown): boolean =>
  value === null ||
  value === false ||
  value === 'none' ||
  (typeof value === 'object' && Object.keys(value).length === 0)

/** What the config says of the adapter. Throws RopewalkError ERR_CONFIG for what is not plain LoRA. */
function readAdapterConfig(folder: AdapterFolder): { rank: number; alpha: number; rankStabilized: boolean } {
  const { config, dir } = folder
  const fail = (message: string): never => {
    throw new RopewalkError('ERR_CONFIG', `${dir}/${adapterConfigName}: ${message}`)
  }
  if (config.peft_type !== 'LORA') fail(`peft_type is ${quote(config.peft_type)}, but only LORA adapters can be used`)
  for (const [field, value] of Object.entries(config)) {
    if (UNDERSTOOD.has(field) || isOff(value)) continue
    fail(
      `${field} is ${quote(value)}: only plain LoRA is supported (one rank and alpha, every layer, no biases, no DoRA), ` +
        'and this adapter would compute something else. Merge it into its base with PEFT, and load that',
    )
  }
  const start = config.init_lora_weights
  if (!PLAIN_STARTS.includes(start)) {
    fail(
      `init_lora_weights is ${quote(start)}, which changes the base too: save the adapter with PEFT's ` +
        'path_initial_model_for_weight_conversion, which makes a plain one of it',
    )
  }
  const { r: rank, lora_alpha: alpha } = config
  if (typeof rank !== 'number' || !Number.isSafeInteger(rank) || rank < 1) {
    return fail(`r is ${quote(rank)}, but must be a whole number >= 1`)
  }
  if (typeof alpha !== 'number' || !(alpha > 0 && alpha < Infinity)) {
    return fail(`lora_alpha is ${quote(alpha)}, but must be a number > 0`)
  }
  return { rank, alpha, rankStabilized: config.use_rslora === true }
}

/** What has to be the base's own; not the positions, which an extension changes by right (NTK also rope_theta). */
const OF_THE_BASE = {
  hidden_size: 'hiddenSize',
  intermediate_size: 'intermediateSize',
  num_hidden_layers: 'layers',
  num_attention_heads: 'heads',
  num_key_value_heads: 'kvHeads',
  head_dim: 'headDim',
  vocab_size: 'vocabSize',
  rms_norm_eps: 'rmsNormEps',
} as const satisfies Record<string, keyof LlamaConfig>

/** The tensors of an adapter may fit another base: its config.json tells. */
function checkBase(config: LlamaConfig, trainedOn: LlamaConfig, path: string): void {
  for (const [field, key] of Object.entries(OF_THE_BASE)) {
    if (trainedOn[key] === config[key]) continue
    throw new RopewalkError(
      'ERR_CONFIG',
      `${path}: ${field} is ${trainedOn[key]}, but the base's is ${config[key]}: the adapter was trained on another ` +
        'base. Give the model that it was trained on',
    )
  }
}

/**
 * The base's positions as the adapter was trained with them, where its folder has them. With positions of the caller's
 * own these hold, and a difference is a warning. Throws RopewalkError ERR_CONFIG for an adapter of another base.
 */
export function adapterPositions(
  config: LlamaConfig,
  { modelConfig, dir }: AdapterFolder,
  given: boolean,
  warnings: string[],
): LlamaConfig {
  if (!modelConfig) return config
  const path = `${dir}/config.json`
  const trainedOn = readConfig(modelConfig, path)
  checkBase(config, trainedOn, path)
  const { rope, maxPositionEmbeddings, originalMaxPositionEmbeddings } = trainedOn
  const positions = { rope, maxPositionEmbeddings, originalMaxPositionEmbeddings }
  if (!given) return { ...config, ...positions }
  const text = (of: typeof positions): string =>
    JSON.stringify([writeRope(of.rope, of.originalMaxPositionEmbeddings), of.maxPositionEmbeddings])
  if (text(config) !== text(positions)) {
    warnings.push(`${dir}: this adapter was trained with other positions than those given (see its config.json)`)
  }
  return config
}

/** The adapter's shape, from its config and the names and dims of its tensors. */
export function checkAdapter(
  folder: AdapterFolder,
  config: LlamaConfig,
): { settings: LoraSettings; rankStabilized: boolean } {
  const { dir, tensors } = folder
  const fail = (message: string): never => {
    throw new RopewalkError('ERR_TENSORS', `${dir}/${adapterWeightsName}: ${message}`)
  }
  const { rank, alpha, rankStabilized } = readAdapterConfig(folder)
  const shapes = parameterShapes(config)
  const parts: LoraSettings['alsoTrain'][number][] = []
  const targets: LoraTarget[] = []
  const wanted = new Map<string, readonly number[]>()
  const has = (name: string): boolean => tensors.has(PREFIX + name)
  const isPart = { embed: /embed_tokens/, norm: /norm\.weight$/, head: /^lm_head/ }
  for (const part of loraParts) {
    const members = shapes.filter(({ name }) => isPart[part].test(name))
    if (!members.some(({ name }) => has(name))) continue
    parts.push(part)
    for (const { name, dims } of members) wanted.set(name, dims)
  }
  for (const target of loraTargets) {
    const members = shapes.filter(({ name }) => name.endsWith(`.${target}.weight`))
    if (!members.some(({ name }) => has(adapterName(name, 'A')) || has(adapterName(name, 'B')))) continue
    targets.push(target)
    for (const { name, dims } of members) {
      wanted.set(adapterName(name, 'A'), [rank, dims[1]!])
      wanted.set(adapterName(name, 'B'), [dims[0]!, rank])
    }
  }
  // PEFT keeps a tied embedding's copy apart from the output matrix unless both are saved.
  if (config.tied && (parts.includes('embed') || has('lm_head.weight'))) {
    for (const name of ['model.embed_tokens.weight', 'lm_head.weight']) {
      if (!has(name)) {
        fail(
          `the base's embedding is its output matrix, but this adapter changes one of them only: ${name} is missing. ` +
            'Train it with ensure_weight_tying, or merge it into its base with PEFT',
        )
      }
      wanted.set(name, shapes[0]!.dims)
    }
  }
  if (targets.length === 0) fail(`no tensor belongs to an adapter of ${loraTargets.join(', ')}`)
  for (const [name, dims] of wanted) {
    const tensor = tensors.get(PREFIX + name)
    if (!tensor) fail(`${PREFIX}${name} is missing: the adapter is incomplete, or of another base or some layers only`)
    else if (tensor.dims.join() !== dims.join()) {
      fail(
        `${PREFIX}${name} is (${tensor.dims.join(',')}), but for this base and rank it has to be (${dims.join(',')}): ` +
          'the adapter belongs to another model',
      )
    } else if (!['F32', 'BF16', 'F16', 'F64'].includes(tensor.dtype)) {
      fail(`${PREFIX}${name} has dtype ${tensor.dtype}; it must be F32, BF16, F16 or F64`)
    }
  }
  for (const name of tensors.keys()) {
    if (name.startsWith(PREFIX) && wanted.has(name.slice(PREFIX.length))) continue
    fail(`${name} is no part of an adapter of this base: ignoring it would change what the model computes`)
  }
  return { settings: { rank, alpha, targets, alsoTrain: parts }, rankStabilized }
}

/** The tensors of an adapter by their names in the model: its own, and what of the base is trained with it. */
export function* adapterTensors(lora: Lora): IterableIterator<{ name: string; value: Tensor }> {
  for (const { name, value } of lora.trained) yield { name, value }
  for (const { name, value } of lora.parameters) yield { name, value }
}

/** Reads an adapter that was checked; what it has of the base replaces that, which must have memory of its own. */
export async function readAdapter(folder: AdapterFolder, base: Parameters, config: LlamaConfig): Promise<Lora> {
  const { settings, rankStabilized } = checkAdapter(folder, config)
  const lora = new Lora(base, config, settings, rankStabilized)
  if (base.device.dry) return lora
  try {
    await lora.parameters.clearPadding()
    await readAdapterTensors(folder, lora, config.tied)
    return lora
  } catch (error) {
    lora.dispose()
    throw error
  }
}

/** Fills the tensors of an adapter from a folder that has them all. */
export async function readAdapterTensors({ dir, tensors }: AdapterFolder, lora: Lora, tied: boolean): Promise<void> {
  const { device } = lora.parameters
  const path = `${dir}/${adapterWeightsName}`
  const file = await open(tensors.values().next().value!.path)
  try {
    for (const { name, value } of adapterTensors(lora)) {
      const tensor = tensors.get(PREFIX + name)
      if (!tensor) throw new RopewalkError('ERR_TENSORS', `${path}: ${PREFIX}${name} is missing`)
      const bad = await device.read(value, file.fd, tensor.offset, tensor.dtype as FileDType)
      if (bad < 0) continue
      throw new RopewalkError(
        'ERR_NOT_FINITE',
        `${path}: ${PREFIX}${name} is NaN or infinite at element ${bad}: the adapter is damaged`,
      )
    }
    const [embedding, head] = ['model.embed_tokens.weight', 'lm_head.weight'].map((name) => tensors.get(PREFIX + name))
    if (!tied || !embedding || !head) return
    const [a, b] = await Promise.all(
      [embedding, head].map(async ({ offset, bytes }) => {
        const data = new Uint8Array(bytes)
        await file.read(data, 0, bytes, offset)
        return data
      }),
    )
    if (Buffer.compare(a!, b!) === 0) return
    throw new RopewalkError(
      'ERR_TENSORS',
      `${path}: lm_head and embed_tokens differ, but in this base they are one: merge the adapter with PEFT instead`,
    )
  } finally {
    await file.close()
  }
}

/** The adapter as PEFT reads it. */
export function writeAdapter(
  lora: Lora,
  config: LlamaConfig,
  dtype: 'float32' | 'bfloat16',
  basePath: string,
): Omit<AdapterSaveOptions, 'overwrite'> {
  const { settings, rankStabilized, parameters } = lora
  const { device } = parameters
  const modules = [
    ...new Set(lora.trained.map(({ name }) => name.split('.').at(-2)!)),
    ...(config.tied && settings.alsoTrain.includes('embed') ? ['lm_head'] : []),
  ]
  const entry = (name: string, value: Tensor): TensorEntry => ({
    name: PREFIX + name,
    dtype: value.dtype === 'f32' ? 'F32' : 'BF16',
    dims: [...value.dims],
    bytes: value.bytes,
    data: () => device.downloadChunks(value),
  })
  const tensors = Array.from(adapterTensors(lora), ({ name, value }) => entry(name, value))
  if (modules.includes('lm_head') && config.tied) tensors.push(entry('lm_head.weight', lora.trained[0]!.value))
  return {
    adapterConfig: {
      peft_type: 'LORA',
      task_type: 'CAUSAL_LM',
      base_model_name_or_path: basePath,
      inference_mode: true,
      r: settings.rank,
      lora_alpha: settings.alpha,
      lora_dropout: 0,
      use_rslora: rankStabilized,
      bias: 'none',
      fan_in_fan_out: false,
      init_lora_weights: true,
      target_modules: settings.targets,
      modules_to_save: modules.length > 0 ? modules : null,
    },
    config: writeConfig(config, dtype),
    card: card(config, basePath),
    tensors,
  }
}

/** PEFT takes the base as its own config.json says; that its positions are others is what its users have to know. */
function card(config: LlamaConfig, basePath: string): string {
  return `---
base_model: ${JSON.stringify(basePath)}
library_name: peft
pipeline_tag: text-generation
tags: [lora, ropewalk]
---

# LoRA adapter of ${basePath}

Trained with a window of ${config.maxPositionEmbeddings} tokens and these positions, which are in this folder's config.json:

\`\`\`json
${JSON.stringify(writeRope(config.rope, config.originalMaxPositionEmbeddings), undefined, 2)}
\`\`\`

The base has to be loaded with that config; PEFT does not do so by itself:

\`\`\`python
from transformers import AutoConfig, AutoModelForCausalLM
from peft import PeftModel

adapter = "..."  # this folder
base = AutoModelForCausalLM.from_pretrained(${JSON.stringify(basePath)}, config=AutoConfig.from_pretrained(adapter))
model = PeftModel.from_pretrained(base, adapter)
\`\`\`
`
}
