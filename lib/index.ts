import { createRequire } from 'node:module'

export { RopewalkError } from './errors.js'
export { passkey, type PasskeyDistance, type PasskeyOptions, type PasskeyResult } from './eval/passkey.js'
export {
  perplexity,
  type PerplexityOptions,
  type PerplexityResult,
  readTokenDocuments,
  type TokenDocument,
} from './eval/perplexity.js'
export type { Tokenizer } from './files/tokenizer.js'
export type { BatchOptions, HostTensor, Tokens } from './model/batch.js'
export type { LlamaConfig } from './model/config.js'
export type { SamplingOptions } from './model/generate.js'
export {
  type CreateOptions,
  type GeneratedToken,
  type GenerateOptions,
  Llama,
  type SaveOptions,
} from './model/llama.js'
export type { LoadOptions } from './model/load.js'
export {
  extendRope,
  inverseFrequencies,
  ntkTheta,
  readRope,
  type RopeConfig,
  type RopeExtension,
  type RopeType,
  ropeTypes,
  type RopeWindow,
  rotationTable,
  writeRope,
} from './rope.js'
export { Device, type DeviceOptions } from './runtime/device.js'
export {
  type StepResult,
  Trainer,
  type TrainerOptions,
  type TrainerProgress,
  type TrainerState,
  type TrainingPlan,
} from './train/trainer.js'

/** This package's version. */
export const version: string = (createRequire(import.meta.url)('../package.json') as { version: string }).version
