import { Llama } from '../index.js'
import { type Command, commonOptions, defined, noteModel, readUse, useOptions } from './options.js'

const options = {
  prompt: { kind: 'text', value: 'text', required: true, help: 'the text to continue' },
  'max-tokens': { kind: 'number', value: 'n', min: 1, whole: true, help: 'tokens to write', default: '64' },
  temperature: { kind: 'number', value: 't', min: 0, help: '0: always the most likely token', default: '0' },
  'top-k': { kind: 'number', value: 'k', min: 0, whole: true, help: 'sample among the k most likely', default: 'all' },
  'top-p': {
    kind: 'number',
    value: 'p',
    above: 0,
    max: 1,
    help: 'sample among these parts of the probability',
    default: '1',
  },
  seed: { kind: 'number', value: 'n', min: 0, whole: true, help: 'of the sampling', default: '0' },
  ...useOptions,
  ...commonOptions,
} as const

export const generate: Command<typeof options> = {
  name: 'generate',
  summary: 'Continues a text, written to stdout as it comes.',
  examples: ['ropewalk generate ./llama-8k --prompt "Once upon a time" --max-tokens 100 --temperature 0.8'],
  operands: ['model'],
  options,
  async run({ operands: [path], values }, output) {
    const { prompt, temperature, seed } = values
    using model = await Llama.load(path!, readUse(values))
    noteModel(model, output)
    const sampling = {
      temperature,
      seed,
      topK: values['top-k'],
      topP: values['top-p'],
      maxTokens: values['max-tokens'],
    }
    const ids: number[] = []
    let text = ''
    for await (const token of model.generate({ prompt, ...defined(sampling) })) {
      ids.push(token.id)
      text += token.text
      if (!output.json) output.stdout.write(token.text)
    }
    output.line()
    output.value({ prompt, text, ids })
  },
}
