import type { PasskeyResult, PerplexityResult } from '../index.js'
import type { ReportFolder } from './folder.js'
import { idOf, type Method } from './models.js'
import { extensionOf, pointsOf, type Settings, windowOf } from './settings.js'
import { isLeftOut, type LeftOut } from './units.js'

/** Where results are, for those who measure them and those who show them. */

export const CORPORA = { pg19: 'PG-19', 'proof-pile': 'Proof-pile' } as const
export type Corpus = keyof typeof CORPORA

export const perplexityKey = (corpus: Corpus, id: string, window: number): string =>
  `perplexity/${corpus}/${id}/${window}`

export function perplexityOf(
  folder: ReportFolder,
  corpus: Corpus,
  id: string,
  window: number,
): PerplexityResult | undefined {
  return resultOf(folder, perplexityKey(corpus, id, window))
}

/** A unit's result; undefined where it is not done or was left out. */
export function resultOf<T extends object>(folder: ReportFolder, key: string): T | undefined {
  const unit = folder.get<T | LeftOut>(key)
  return isLeftOut(unit) ? undefined : unit
}

export const passkeyKey = (id: string, context: number): string => `passkey/${id}/${context}`

export const passkeyOf = (folder: ReportFolder, id: string, context: number): PasskeyResult | undefined =>
  resultOf(folder, passkeyKey(id, context))

/** Ids of a method's models over the steps, from 0 on. */
export const stepIds = (settings: Settings, method: Method, factor: number): { step: number; id: string }[] =>
  pointsOf(extensionOf(settings, factor), settings.points).map((step) => ({
    step,
    id: idOf({ method, factor, step }),
  }))

/** The id of a method's model after all steps. */
export const finalId = (settings: Settings, method: Method, factor: number): string =>
  idOf({ method, factor, step: method === 'base' ? 0 : extensionOf(settings, factor).steps })

export const largestWindow = ({ extensions }: Settings, window: number): number =>
  Math.max(...extensions.map(({ factor }) => windowOf(window, factor)))
