// Saving a model's folder, and the durable files beneath it.
import { createHash } from 'node:crypto'
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { replaceFolder, requireSpace, sha256File, writeFailure, writeFileDurable } from '../../lib/files/durable.js'
import { openModelFolder } from '../../lib/files/folder.js'
import { cloneJson } from '../../lib/files/json.js'
import type { TensorEntry } from '../../lib/files/safetensors.js'
import { saveModelFolder, type SaveOptions } from '../../lib/files/save.js'
import { listing } from './listing.js'

const fixtures = fileURLToPath(new URL('../fixtures/', import.meta.url))
const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-save-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

const tiny = (name: string): TensorEntry => ({ name, dtype: 'F32', dims: [1], bytes: 4, data: () => new Uint8Array(4) })
const index = 'model.safetensors.index.json'

t.test('saving: whole or not at all', async (t) => {
  const parent = join(dir, 'save')
  const target = join(parent, 'deep', 'model')
  const options = (more: Partial<SaveOptions> = {}): SaveOptions => ({
    config: { a: 1, factor: 8, b: undefined },
    tensors: [tiny('w')],
    ...more,
  })
  await saveModelFolder(target, options({ generationConfig: { top_p: 1 }, copyFrom: join(fixtures, 'mha-f32') }))
  t.strictSame(fs.readdirSync(target).sort(), [
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'tokenizer.json',
  ])
  t.equal(fs.readFileSync(join(target, 'config.json'), 'utf8'), '{\n  "a": 1,\n  "factor": 8.0\n}\n')
  t.strictSame(fs.readdirSync(join(parent, 'deep')), ['model'], 'no temporary folder is left')

  const before = listing(target)
  await t.rejects(saveModelFolder(target, options()), {
    code: 'ERR_EXISTS',
    message: /model: exists already.*overwrite: true/,
  })
  const unread: TensorEntry = { ...tiny('w'), data: () => t.fail('refused before anything is read') as never }
  await t.rejects(saveModelFolder(target, options({ tensors: [unread] })), { code: 'ERR_EXISTS' })
  const failing = (error: Error): TensorEntry => ({ ...tiny('x'), data: () => Promise.reject(error) })
  const full = Object.assign(new Error('no space left'), { code: 'ENOSPC' })
  const failures: [SaveOptions, any][] = [
    [
      options({ tensors: [tiny('w'), failing(full)] }),
      { code: 'ERR_NO_SPACE', message: /bytes are needed, \d+ bytes.* free/ },
    ],
    [options({ tensors: [failing(new Error('device lost'))] }), { message: 'device lost' }],
    [options({ tensors: [{ ...tiny('x'), bytes: 5 }] }), { message: /tensor "x": 5 bytes/ }],
    [options({ tensors: [tiny('w'), tiny('w')] }), { message: /"w".*(taken|twice)/ }],
    [options({ tensors: [tiny('w'), tiny('w')], maxShardBytes: 4 }), { message: /"w" is given twice/ }],
    [options({ config: { a: Infinity } }), { message: /a: Infinity/ }],
    [options({ signal: AbortSignal.abort() }), { name: 'AbortError' }],
    [options({ maxShardBytes: 0 }), { message: /maxShardBytes: 0/ }],
    [options({ copyFrom: join(dir, 'nowhere') }), { code: 'ERR_NOT_FOUND' }],
    [
      options({ tensors: [{ ...tiny('x'), dims: [2 ** 48], bytes: 2 ** 50 }] }),
      { code: 'ERR_NO_SPACE', message: /1\.0 PiB|1024\.0 TiB/ },
    ],
  ]
  for (const [bad, expected] of failures) {
    await t.rejects(saveModelFolder(target, { ...bad, overwrite: true }), expected)
    t.strictSame(listing(target), before, 'the old model is untouched')
    await t.rejects(saveModelFolder(join(parent, 'deep', 'fresh'), bad), expected)
    t.strictSame(fs.readdirSync(join(parent, 'deep')), ['model'], 'nothing else is left')
  }
  await saveModelFolder(
    target,
    options({ overwrite: true, maxShardBytes: 4, tensors: [tiny('w'), tiny('v'), tiny('u')] }),
  )
  t.strictSame(fs.readdirSync(join(parent, 'deep')), ['model'], 'the old folder is gone when the new one is there')
  t.strictSame(fs.readdirSync(target).sort(), [
    'config.json',
    ...[1, 2, 3].map((i) => `model-0000${i}-of-00003.safetensors`),
    index,
  ])
  const saved = listing(target)
  const lost: [name: string, content: string | undefined, message: RegExp][] = [
    ['thesis.txt', 'x', /model: it holds thesis\.txt, which overwriting would delete: choose another folder/],
    ['README.md', 'x', /holds README\.md, which/],
    ['pytorch_model.bin', 'x', /holds pytorch_model\.bin/],
    ['runs', undefined, /holds runs, which/],
  ]
  for (const [name, content, message] of lost) {
    const path = join(target, name)
    if (content === undefined) fs.mkdirSync(path)
    else fs.writeFileSync(path, content)
    await t.rejects(saveModelFolder(target, options({ overwrite: true })), { code: 'ERR_EXISTS', message })
    fs.rmSync(path, { recursive: true })
    t.strictSame(listing(target), saved)
  }
  const notes = join(parent, 'notes')
  fs.mkdirSync(notes)
  fs.writeFileSync(join(notes, 'model.safetensors'), 'x')
  await t.rejects(saveModelFolder(notes, options({ overwrite: true })), { message: /is no saved model or adapter/ })
  const empty = join(parent, 'empty')
  fs.mkdirSync(empty)
  await t.resolves(saveModelFolder(empty, options()), 'an empty folder is nothing to lose')
  const file = join(parent, 'file')
  fs.writeFileSync(file, 'x')
  await t.rejects(saveModelFolder(file, options()), { code: 'ERR_EXISTS' })
  await t.rejects(saveModelFolder(file, options({ overwrite: true })), { code: 'ERR_EXISTS', message: /it is a file/ })
  await t.rejects(saveModelFolder(join(file, 'x'), options()), { code: /ERR_WRITE|ENOTDIR/ })

  const folder = await openModelFolder(empty)
  const config = cloneJson(folder.config)
  await folder.close()
  config.a = 2
  await t.resolves(saveModelFolder(empty, options({ config, overwrite: true })))
})

t.test('durable files', async (t) => {
  const path = join(dir, 'state.json')
  await writeFileDurable(path, 'one')
  await writeFileDurable(path, Buffer.from('two'))
  t.equal(fs.readFileSync(path, 'utf8'), 'two')
  t.equal(await sha256File(path), createHash('sha256').update('two').digest('hex'))
  await t.rejects(writeFileDurable(join(dir, 'no', 'where'), 'x'), {
    code: 'ERR_WRITE',
    message: /where: cannot be written \(ENOENT/,
  })
  t.notOk(fs.readdirSync(dir).some((name) => name.includes('.tmp-')))
  await t.resolves(requireSpace(dir, 1))
  await t.rejects(requireSpace(dir, 2 ** 60), { code: 'ERR_NO_SPACE' })
  const quota = await writeFailure(Object.assign(new Error('x'), { code: 'EDQUOT' }), path, 2048)
  t.match(quota, {
    code: 'ERR_NO_SPACE',
    message: /state\.json: the disk quota is used up: 2048 bytes \(2\.0 KiB\) are needed/,
  })
  const plain = new TypeError('x')
  t.equal(await writeFailure(plain, path, 1), plain)

  const next = join(dir, 'next')
  const place = join(dir, 'place')
  for (const where of [next, place]) {
    fs.mkdirSync(where)
    fs.writeFileSync(join(where, 'name'), where)
  }
  await t.rejects(replaceFolder(next, place), { code: 'ERR_EXISTS' })
  await t.rejects(replaceFolder(join(dir, 'absent'), place, { overwrite: true }), { code: 'ENOENT' })
  t.equal(fs.readFileSync(join(place, 'name'), 'utf8'), place, 'the old one is back')
  const inside = join(next, 'inside')
  fs.mkdirSync(inside)
  fs.writeFileSync(join(inside, 'name'), 'kept')
  await t.rejects(replaceFolder(next, inside, { overwrite: true }), { code: 'EINVAL' })
  t.strictSame(fs.readdirSync(next).sort(), ['inside', 'name'], 'renamed back where the new one cannot take the place')
  await replaceFolder(next, place, { overwrite: true })
  t.equal(fs.readFileSync(join(place, 'name'), 'utf8'), next)
})
