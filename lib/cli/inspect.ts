import { readdir, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { formatBytes } from '../errors.js'
import { Llama } from '../index.js'
import { type Command, commonOptions } from './options.js'

const options = { ...commonOptions }

export const inspect: Command<typeof options> = {
  name: 'inspect',
  summary:
    'Says what is in a model folder: shapes, positions, tokenizer, files, and what is unusual. Reads no weights.',
  examples: ['ropewalk inspect ./llama-2-7b', 'ropewalk inspect ./llama-8k --json'],
  operands: ['model'],
  options,
  async run({ operands }, output) {
    const path = operands[0]!
    using model = await Llama.load(path, { device: 'dry' })
    const { config, contextWindow, dtype, parameterCount } = model
    const warnings = [...model.warnings]
    const tokenizer = await model.tokenizer().catch((error: Error) => {
      warnings.push(`no tokenizer, only token ids can be used: ${error.message}`)
      return undefined
    })
    if (tokenizer && tokenizer.maxId + 1 < config.vocabSize) {
      const unused = config.vocabSize - tokenizer.maxId - 1
      warnings.push(`the embedding has ${unused} rows more than the tokenizer has ids (padding; harmless)`)
    }
    const files = await listFiles(path)
    const parameters = model.parameters().map(({ name, dims }) => ({ name, dims }))
    output.value({
      path,
      dtype,
      parameterCount,
      contextWindow,
      config: { ...config, raw: undefined },
      tokenizer: tokenizer && { ...tokenizer },
      files,
      parameters,
      warnings,
    })
    const { rope } = config
    const original = rope.originalMaxPositionEmbeddings
    const extra = Object.entries(rope).filter(
      ([key]) => !['type', 'theta', 'originalMaxPositionEmbeddings'].includes(key),
    )
    const rows: [string, string][] = [
      ['model', path],
      ['parameters', `${formatCount(parameterCount)}, ${dtype}`],
      ['layers', `${config.layers} of width ${config.hiddenSize}, MLP ${config.intermediateSize}`],
      ['attention', `${config.heads} heads of ${config.headDim}, ${config.kvHeads} for keys and values`],
      ['vocabulary', `${config.vocabSize}, embedding ${config.tied ? 'shared with' : 'apart from'} lm_head`],
      ['context', `${contextWindow} tokens${original ? `, ${original} before any scaling` : ''}`],
      [
        'positions',
        [`${rope.type}, theta ${rope.theta}`, ...extra.map(([key, value]) => `${key} ${String(value)}`)].join(', '),
      ],
      ['special ids', `bos ${config.bosId ?? 'none'}, eos ${config.eosIds.join(', ') || 'none'}`],
      ['tokenizer', tokenizer ? `${tokenizer.vocabSize} tokens, bos ${tokenizer.bosId ?? 'none'}` : 'none'],
      ...files.map(({ name, bytes }, i): [string, string] => [
        i === 0 ? 'files' : '',
        `${name}, ${formatBytes(bytes)}`,
      ]),
      ...warnings.map((warning, i): [string, string] => [i === 0 ? 'unusual' : '', warning]),
    ]
    for (const [label, text] of rows) output.line(`${label.padEnd(12)}${text}`)
  },
}

async function listFiles(path: string): Promise<{ name: string; bytes: number }[]> {
  const files: { name: string; bytes: number }[] = []
  for (const name of (await readdir(path)).sort()) {
    const info = await stat(join(path, name)).catch(() => undefined)
    if (info?.isFile()) files.push({ name, bytes: info.size })
  }
  return files
}

/** 6738415616 -> "6738415616 (6.74 billion)" */
function formatCount(count: number): string {
  if (count < 1e6) return String(count)
  return `${count} (${count < 1e9 ? `${(count / 1e6).toPrecision(3)} million` : `${(count / 1e9).toPrecision(3)} billion`})`
}
