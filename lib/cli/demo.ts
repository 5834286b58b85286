import { mkdir, rmdir } from 'node:fs/promises'
import { dirname, join, resolve } from 'node:path'
import { RopewalkError } from '../errors.js'
import { type DemoResult, QUICK, RECIPE, runDemo } from '../demo/demo.js'
import { page, picture, tableOf } from '../demo/page.js'
import { requireSpace, temporaryName, writeFailure, writeFileDurable } from '../files/durable.js'
import { type Command, commonOptions } from './options.js'
import type { Output } from './output.js'

const options = {
  seed: { kind: 'number', value: 'n', min: 0, max: 1e6, whole: true, help: 'of texts and prompts', default: '1' },
  out: { kind: 'text', value: 'folder', help: 'where the page goes', default: './ropewalk-demo' },
  quick: { kind: 'flag', help: 'fewer steps: a look, no measurement' },
  ...commonOptions,
} as const

/** What the page, the figures and the picture take, generously. */
const SPACE = 1 << 20

export const demo: Command<typeof options> = {
  name: 'demo',
  summary: 'Shows Position Interpolation in miniature, on this CPU, in about two minutes.',
  details:
    'A small LLaMA that comes with the package is stretched to 4 times its window: extrapolated, interpolated,\n' +
    'interpolated and fine-tuned, and fine-tuned without interpolation. Perplexity and passkey retrieval of all four are\n' +
    'printed, and drawn in a page: <out>/index.html. Ctrl-C ends it and leaves nothing behind.',
  examples: ['ropewalk demo', 'ropewalk demo --seed 2 --out ./demo-2', 'ropewalk demo --quick'],
  operands: [],
  options,
  async run({ values: { seed = 1, out = './ropewalk-demo', quick } }, output) {
    const created = await prepare(out)
    const controller = new AbortController()
    let code: number | undefined
    const codes = { SIGINT: 130, SIGTERM: 143 } as const
    const handler = (name: 'SIGINT' | 'SIGTERM'): void => {
      code ??= codes[name]
      controller.abort()
    }
    process.on('SIGINT', handler)
    process.on('SIGTERM', handler)
    const progress = output.progress('demo', 100)
    let result: DemoResult
    try {
      const recipe = quick ? QUICK : RECIPE
      const onProgress = (done: number, task: string): void => progress.update(Math.floor(100 * done), `% ${task}`)
      result = await runDemo({ seed, recipe, signal: controller.signal, onProgress })
    } catch (error) {
      if (created !== undefined) await removeFolders(out, created)
      if (code === undefined) throw error
      progress.end()
      output.note('stopped; nothing was written')
      return code
    } finally {
      progress.end()
      process.off('SIGINT', handler)
      process.off('SIGTERM', handler)
    }
    await writeFileDurable(join(out, 'index.html'), page(result))
    await writeFileDurable(join(out, 'demo.svg'), picture(result))
    await writeFileDurable(join(out, 'result.json'), `${JSON.stringify(result, null, 2)}\n`)
    show(result, out, output)
    output.value({ ...result, out })
    return 0
  },
}

/** Makes sure, before two minutes of work, that the result can be written; gives the first folder that it had to make. */
async function prepare(out: string): Promise<string | undefined> {
  try {
    const created = await mkdir(out, { recursive: true })
    await requireSpace(out, SPACE)
    const probe = temporaryName(join(out, 'index.html'))
    await mkdir(probe)
    await rmdir(probe)
    return created
  } catch (error) {
    const failure = await writeFailure(error, out, SPACE)
    const { code, message } = failure as RopewalkError
    if (code !== 'ERR_WRITE') throw failure
    throw new RopewalkError(code, `${message}: choose another folder with --out`, { cause: error })
  }
}

/** Removes the folders that were made for nothing, from the inside out, unless something else is in them by now. */
async function removeFolders(out: string, created: string): Promise<void> {
  for (let path = resolve(out); ; path = dirname(path)) {
    const removed = await rmdir(path).then(
      () => true,
      () => false,
    )
    if (!removed || path === resolve(created)) return
  }
}

function show(result: DemoResult, out: string, output: Output): void {
  const { base, recipe, extensions, seconds } = result
  const line = (text = ''): void => output.line(text)
  line(`A LLaMA of ${(base.parameters / 1e6).toFixed(1)}M weights, trained in windows of ${base.window} tokens.`)
  for (const extension of extensions) {
    const { head, rows } = tableOf(extension, base.window)
    const widths = head.map((_, i) => Math.max(...[head, ...rows].map((row) => row[i]!.length)))
    const align = (row: readonly string[]): string =>
      row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!))).join('  ')
    const { steps } = recipe.extensions.find(({ factor }) => factor === extension.factor)!
    line(`\n${extension.factor}x: from ${base.window} to ${extension.window} tokens, fine-tuned for ${steps} steps`)
    for (const row of [head, ...rows]) line(align(row))
    line()
    for (const { claim, seen, figures } of extension.findings) {
      line(`${seen ? '[seen]    ' : '[not seen]'} ${claim}`)
      line(`           ${figures}`)
    }
  }
  line('\n8x is left out: 150 steps, as many as fitted beside 4x, brought no key back there.')
  line('ppl a-b: perplexity of tokens with a to b tokens before them. key n: passkeys found in prompts of n tokens.')
  line(
    `k_max: distance up to which at least 20 % of the keys are found. ${Math.round(seconds)} s; charts: ${out}/index.html`,
  )
}
